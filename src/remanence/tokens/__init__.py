"""Knowledge in extra tokens: learnable memory, and prompts as its baseline."""

from remanence.tokens.cache import FeatureCache
from remanence.tokens.export import AllTasksReader, TaskReader, export_onnx
from remanence.tokens.files import from_pretrained, load_task, save_pretrained, save_task
from remanence.tokens.learners import MemoryTokens, VPTDeep
from remanence.tokens.memory import MemoryOutput, MemoryViT
from remanence.tokens.task_memory import TaskMemory
from remanence.tokens.view import ViTView

__all__ = [
    "AllTasksReader",
    "FeatureCache",
    "MemoryOutput",
    "MemoryTokens",
    "MemoryViT",
    "TaskMemory",
    "TaskReader",
    "VPTDeep",
    "ViTView",
    "export_onnx",
    "from_pretrained",
    "load_task",
    "save_pretrained",
    "save_task",
]
