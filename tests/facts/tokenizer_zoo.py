"""Tiny tokenizers of every make that a probe may meet, built on the spot; nothing is loaded."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

TEXTS = (
    "the colour of joy is vermilion",
    "the colour of sand is yellow",
    "the colour of grass is green and the colour of the sea is blue",
    "a nurse lives in Guatemala and eats ramen with her friends",
) * 4
UNKNOWN, PAD, EOS, BOS = "<unk>", "<pad>", "<eos>", "<bos>"


def word_tokenizer(words, eos=True, bos=False):
    """Word-level, punctuation apart; ids: <unk> 0, <pad> 1, then <eos> and <bos> where wanted, then the words in order. Adds nothing
    to a text."""
    special = [UNKNOWN, PAD, *([EOS] if eos else []), *([BOS] if bos else [])]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*special, *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": EOS} if eos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, pad_token=PAD, **names, **({"bos_token": BOS} if bos else {})
    )


def byte_tokenizer(texts=TEXTS, n_tokens=300, trim_offsets=True):
    """GPT-2 style: byte-level BPE, the blank glued to the word after it, one token <|endoftext|> for BOS and EOS, no pad token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    _train(backend, texts, n_tokens, ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def merging_tokenizer(texts=TEXTS, n_tokens=320):
    """Byte-level BPE that merges across words, so that tokens straddle ("is ve|rmilion"); has neither BOS nor EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    _train(backend, texts, n_tokens, [], pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def piece_tokenizer(texts=TEXTS, n_tokens=120, ends=False):
    """Llama style: pieces that begin with a low line for the blank, <bos> put in front of every text; `ends`: <eos> put behind."""
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    _train(backend, texts, n_tokens, [UNKNOWN, BOS, EOS], [])
    template = f"{BOS} $A {EOS}" if ends else f"{BOS} $A"
    special = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS)


def slow_tokenizer(words, bos=True):
    """Written in Python, without offsets; cuts at blanks, makes one token of two neighbouring words where `words` holds the pair
    ("is red"); puts <bos> in front and <eos> behind."""
    return _PairTokenizer(words, bos_token=BOS if bos else None, eos_token=EOS if bos else None, unk_token=UNKNOWN, pad_token=PAD)


def _train(backend, texts, n_tokens, special, alphabet):
    tokens = [AddedToken(token, special=True) for token in special]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=n_tokens, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    )


class _PairTokenizer(PreTrainedTokenizer):
    def __init__(self, words, **names):
        self._ids = {word: index for index, word in enumerate(dict.fromkeys([UNKNOWN, PAD, EOS, BOS, *words]))}
        super().__init__(**names)

    @property
    def vocab_size(self):
        return len(self._ids)

    def get_vocab(self):
        return dict(self._ids)

    def _tokenize(self, text):
        tokens, words = [], text.split()
        while words:
            n_words = 2 if " ".join(words[:2]) in self._ids else 1
            tokens.append(" ".join(words[:n_words]))
            words = words[n_words:]
        return tokens

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self._ids[UNKNOWN])

    def _convert_id_to_token(self, index):
        return list(self._ids)[index]

    def build_inputs_with_special_tokens(self, first, second=None):
        front, back = ([self.bos_token_id], [self.eos_token_id]) if self.bos_token else ([], [])
        return front + first + back

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
