"""The words that tell the model what to do: the same in training, in the commands and in the evaluation."""

CAPTION_INSTRUCTION = "caption:"
DESCRIBE_INSTRUCTION = "describe:"
DRAW_INSTRUCTION = "draw: {}"
BLIP3O_INSTRUCTION = "Please generate image based on the following caption: {}"  # of its released models


def draw_instruction(prompt: str, form: str = DRAW_INSTRUCTION) -> str:
    """The text that tells the model to draw `prompt`, which takes the place of `{}`."""
    return form.replace("{}", prompt, 1)
