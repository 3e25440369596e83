"""remanence: where should new knowledge live in a neural network?"""
