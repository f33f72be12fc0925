"""Stanford Alpaca's prompt, in its parts."""

_INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
INTRO = _INTRO.format("")
INTRO_WITH_INPUT = _INTRO.format(", paired with an input that provides further context")
TURN = "### Instruction:\n{instruction}\n\n### Response:\n"
TURN_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
