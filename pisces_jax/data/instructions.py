"""The words that tell the model what is wanted of it: one wording for training, the commands and the evaluation."""

CAPTION_INSTRUCTION = "caption:"
DESCRIBE_INSTRUCTION = "describe:"


def draw_instruction(prompt: str) -> str:
    """What the model is told in order to draw `prompt`."""
    return f"draw: {prompt}"
