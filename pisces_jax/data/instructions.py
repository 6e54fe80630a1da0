"""The words that tell the model what to do: the same in training, in the commands and in the evaluation."""

CAPTION_INSTRUCTION = "caption:"
DESCRIBE_INSTRUCTION = "describe:"


def draw_instruction(prompt: str) -> str:
    """The text that tells the model to draw `prompt`."""
    return f"draw: {prompt}"
