"""LLaMA-Factory's templates by name, and a chat template for each that writes and marks the same text.

Names and formats: hiyouga/LLaMA-Factory 0.9.5, its data/template. Whatever stands in a template's
assistant format is learned, with the newline behind the end of a turn.
"""

from dataclasses import dataclass

Thoughts = tuple[str, str]  # the words around a thought


@dataclass(frozen=True)
class Shape:
    """The text of each kind of turn; {x} is the message, {bos} and {eos} are the tokenizer's tokens.

    A question's format ends with the prompt for the answer. tool: of a tool's result; "": as a question. joins_system:
    the system text stands within the first question.
    """

    user: str
    assistant: str
    system: str = "{x}"
    tool: str = ""
    prefix: str = ""
    joins_system: bool = False


@dataclass(frozen=True)
class ForeignTemplate:
    """One of LLaMA-Factory's templates.

    system: of rows that have none. end: the token that becomes the tokenizer's end-of-text. thoughts: the words that
    are put, empty, before answers without a thought. writes_tools: in the way that Qwen's models have.
    """

    shape: Shape
    system: str = ""
    end: str | None = None
    thoughts: Thoughts | None = None
    writes_tools: bool = False


@dataclass(frozen=True)
class Settings:
    """Settings beside `template`, by LLaMA-Factory's names.

    merges_results: tool results that follow each other are one turn, as in rows whose `formatting` is openai.
    """

    default_system: str | None = None
    enable_thinking: bool | None = True
    preserve_thinking: bool = False
    mask_history: bool = False
    merges_results: bool = False


_TURN, _ANSWER = "<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n", "{x}<|im_end|>\n"
_SYSTEM = "<|im_start|>system\n{x}<|im_end|>\n"
_TOOL = "<|im_start|>tool\n{x}<|im_end|>\n<|im_start|>assistant\n"
_CHATML = Shape(_TURN, _ANSWER, _SYSTEM, _TOOL)
_PLAIN = Shape(_TURN, _ANSWER, _SYSTEM)
_BEGUN = Shape(_TURN, _ANSWER, _SYSTEM, _TOOL, prefix="{bos}")
_QWEN = Shape(
    _TURN,
    _ANSWER,
    _SYSTEM,
    "<|im_start|>user\n<tool_response>\n{x}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
)
_LLAMA3_HEAD = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA3 = Shape(
    "<|start_header_id|>user<|end_header_id|>\n\n{x}<|eot_id|>" + _LLAMA3_HEAD,
    "{x}<|eot_id|>",
    "<|start_header_id|>system<|end_header_id|>\n\n{x}<|eot_id|>",
    "<|start_header_id|>ipython<|end_header_id|>\n\n{x}<|eot_id|>" + _LLAMA3_HEAD,
    prefix="{bos}",
)
_LLAMA4_HEAD = "<|header_start|>assistant<|header_end|>\n\n"
_LLAMA4 = Shape(
    "<|header_start|>user<|header_end|>\n\n{x}<|eot|>" + _LLAMA4_HEAD,
    "{x}<|eot|>",
    "<|header_start|>system<|header_end|>\n\n{x}<|eot|>",
    "<|header_start|>ipython<|header_end|>\n\n{x}<|eot|>" + _LLAMA4_HEAD,
    prefix="{bos}",
)
_LLAMA2 = Shape("{bos}[INST] {x} [/INST]", "{x}{eos}", "<<SYS>>\n{x}\n<</SYS>>\n\n", joins_system=True)
_GEMMA = Shape(
    "<start_of_turn>user\n{x}<end_of_turn>\n<start_of_turn>model\n",
    "{x}<end_of_turn>\n",
    "{x}\n\n",
    "<start_of_turn>tool\n{x}<end_of_turn>\n<start_of_turn>model\n",
    prefix="{bos}",
    joins_system=True,
)
_RESULTS = '[TOOL_RESULTS]{"content": {x}}[/TOOL_RESULTS]'
_MINISTRAL = Shape("[INST]{x}[/INST]", "{x}{eos}", "{x}\n\n", _RESULTS, prefix="{bos}", joins_system=True)
_MISTRAL = Shape(
    "[INST] {x}[/INST]",
    " {x}{eos}",
    "{x}\n\n",
    _RESULTS.replace("]{", "] {"),
    prefix="{bos}",
    joins_system=True,
)
_MISTRAL_SMALL = Shape("[INST]{x}[/INST]", "{x}{eos}", "[SYSTEM_PROMPT]{x}[/SYSTEM_PROMPT]", _RESULTS, prefix="{bos}")
_PHI = Shape("<|user|>\n{x}<|end|>\n<|assistant|>\n", "{x}<|end|>\n", "<|system|>\n{x}<|end|>\n")
_GRANITE_HEAD = "<|start_of_role|>assistant<|end_of_role|>"
_GRANITE = Shape(
    "<|start_of_role|>user<|end_of_role|>{x}<|end_of_text|>\n" + _GRANITE_HEAD,
    "{x}<|end_of_text|>\n",
    "<|start_of_role|>system<|end_of_role|>{x}<|end_of_text|>\n",
)
_DEEPSEEK3 = Shape("<｜User｜>{x}<｜Assistant｜>", "{x}{eos}", prefix="{bos}")
_HELPFUL = "You are a helpful assistant."
_THINK: Thoughts = ("<think>\n", "\n</think>\n\n")
_CURT: Thoughts = ("<think>", "</think>")
_IM_END = "<|im_end|>"

TEMPLATES: dict[str, ForeignTemplate] = {
    "alpaca": ForeignTemplate(
        Shape("### Instruction:\n{x}\n\n### Response:\n", "{x}{eos}\n\n"),
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    ),
    "chatml": ForeignTemplate(_CHATML, end=_IM_END),
    "cohere": ForeignTemplate(
        Shape(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{x}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            "{x}{eos}",
            "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{x}<|END_OF_TURN_TOKEN|>",
            prefix="{bos}",
        )
    ),
    "cpm4": ForeignTemplate(_BEGUN),
    "deepseek": ForeignTemplate(Shape("User: {x}\n\nAssistant:", "{x}{eos}", "{x}\n\n", prefix="{bos}")),
    "deepseek3": ForeignTemplate(_DEEPSEEK3),
    "deepseekr1": ForeignTemplate(_DEEPSEEK3, thoughts=_THINK),
    "default": ForeignTemplate(Shape("Human: {x}{eos}\nAssistant:", "{x}{eos}\n", "System: {x}{eos}\n")),
    "empty": ForeignTemplate(Shape("{x}", "{x}")),
    "ernie_nothink": ForeignTemplate(
        Shape("User: {x}\nAssistant: ", "{x}<|end_of_sentence|>", "{x}\n", prefix="<|begin_of_sentence|>")
    ),
    "exaone": ForeignTemplate(Shape("[|user|]{x}\n[|assistant|]", "{x}{eos}\n", "[|system|]{x}[|endofturn|]\n")),
    "falcon_h1": ForeignTemplate(_BEGUN),
    "gemma": ForeignTemplate(_GEMMA, end="<end_of_turn>"),
    "gemma3": ForeignTemplate(_GEMMA, end="<end_of_turn>"),
    "gemma3n": ForeignTemplate(_GEMMA, end="<end_of_turn>"),
    "granite3": ForeignTemplate(_GRANITE),
    "granite4": ForeignTemplate(
        Shape(
            _GRANITE.user,
            _GRANITE.assistant,
            _GRANITE.system,
            "<|start_of_role|>tool<|end_of_role|>{x}<|end_of_text|>\n<|start_of_role|>assistant\n",
        ),
        "You are Granite, developed by IBM. You are a helpful AI assistant.",
    ),
    "hunyuan": ForeignTemplate(Shape("{x}<|extra_0|>", "{x}<|eos|>", "{x}<|extra_4|>", prefix="<|startoftext|>")),
    "intern_s1": ForeignTemplate(Shape(_TURN, _ANSWER, _SYSTEM, prefix="{bos}")),
    "lfm2": ForeignTemplate(
        Shape(_TURN, _ANSWER, _SYSTEM, _TOOL.replace("{x}", "<|tool_response_start|>{x}<|tool_response_end|>")),
        "You are a helpful AI assistant.",
        end=_IM_END,
    ),
    "llama2": ForeignTemplate(_LLAMA2),
    "llama2_zh": ForeignTemplate(_LLAMA2, "You are a helpful assistant. 你是一个乐于助人的助手。"),
    "llama3": ForeignTemplate(_LLAMA3, end="<|eot_id|>"),
    "llama4": ForeignTemplate(_LLAMA4, end="<|eot|>"),
    "mimo": ForeignTemplate(_QWEN, _HELPFUL, _IM_END, _THINK, writes_tools=True),
    "mimo_v2": ForeignTemplate(
        _QWEN, "You are MiMo, a helpful AI assistant engineered by Xiaomi.", _IM_END, _CURT, writes_tools=True
    ),
    "ministral": ForeignTemplate(_MINISTRAL),
    "ministral3": ForeignTemplate(_MINISTRAL),
    "mistral": ForeignTemplate(_MISTRAL),
    "mistral_small": ForeignTemplate(_MISTRAL_SMALL),
    "moonlight": ForeignTemplate(
        Shape(
            "<|im_user|>user<|im_middle|>{x}<|im_end|><|im_assistant|>assistant<|im_middle|>",
            "{x}<|im_end|>",
            "<|im_system|>system<|im_middle|>{x}<|im_end|>",
        ),
        "You are a helpful assistant provided by Moonshot-AI.",
        end=_IM_END,
    ),
    "olmo": ForeignTemplate(Shape("<|user|>\n{x}<|assistant|>\n", "{x}{eos}", prefix="{eos}")),
    "openchat": ForeignTemplate(
        Shape("GPT4 Correct User: {x}{eos}GPT4 Correct Assistant:", "{x}{eos}", prefix="{bos}")
    ),
    "openchat-3.6": ForeignTemplate(
        Shape(
            "<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{x}<|eot_id|>"
            "<|start_header_id|>GPT4 Correct Assistant<|end_header_id|>\n\n",
            "{x}{eos}",
            prefix="{bos}",
        )
    ),
    "opencoder": ForeignTemplate(_CHATML, "You are OpenCoder, created by OpenCoder Team."),
    "phi": ForeignTemplate(_PHI, end="<|end|>"),
    "phi_small": ForeignTemplate(_PHI, end="<|end|>"),  # its prefix is written as nothing
    "phi4": ForeignTemplate(
        Shape(
            "<|im_start|>user<|im_sep|>{x}<|im_end|><|im_start|>assistant<|im_sep|>",
            "{x}<|im_end|>",
            "<|im_start|>system<|im_sep|>{x}<|im_end|>",
        ),
        end=_IM_END,
    ),
    "phi4_mini": ForeignTemplate(
        Shape("<|user|>{x}<|end|><|assistant|>", "{x}<|end|>", "<|system|>{x}<|end|>"), end="<|end|>"
    ),
    "pixtral": ForeignTemplate(_MINISTRAL),
    "qwen": ForeignTemplate(
        _QWEN, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", _IM_END, writes_tools=True
    ),
    "qwen2_vl": ForeignTemplate(_QWEN, _HELPFUL, _IM_END, writes_tools=True),
    "qwen2_omni": ForeignTemplate(_QWEN, _HELPFUL, _IM_END, writes_tools=True),
    "qwen3": ForeignTemplate(_QWEN, end=_IM_END, thoughts=_THINK, writes_tools=True),
    "qwen3_nothink": ForeignTemplate(_QWEN, end=_IM_END, writes_tools=True),
    "qwen3_vl": ForeignTemplate(_QWEN, end=_IM_END, thoughts=_THINK, writes_tools=True),
    "qwen3_vl_nothink": ForeignTemplate(_QWEN, end=_IM_END, writes_tools=True),
    "qwen3_5": ForeignTemplate(_QWEN, end=_IM_END, thoughts=_THINK),
    "qwen3_5_nothink": ForeignTemplate(_QWEN, end=_IM_END),
    "qwen3_6": ForeignTemplate(_QWEN, end=_IM_END, thoughts=_THINK),
    "seed_oss": ForeignTemplate(
        Shape("{bos}user\n{x}{eos}{bos}assistant\n", "{x}{eos}", "{bos}system\n{x}{eos}"),
        thoughts=("<seed:think>", "</seed:think>"),
    ),
    "smollm": ForeignTemplate(_PLAIN),
    "smollm2": ForeignTemplate(_PLAIN, "You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "starchat": ForeignTemplate(Shape("<|user|>\n{x}<|end|>\n<|assistant|>", _PHI.assistant, _PHI.system)),
    "vicuna": ForeignTemplate(
        Shape("USER: {x} ASSISTANT:", "{x}{eos}"),
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": ForeignTemplate(_PLAIN),
    "zephyr": ForeignTemplate(
        Shape("<|user|>\n{x}{eos}<|assistant|>\n", "{x}{eos}", "<|system|>\n{x}{eos}"),
        "You are Zephyr, a helpful assistant.",
    ),
}

# Templates whose answers have no end of their own: it is taught as the label of the next turn's first token.
WITHOUT_AN_END = (
    "aeva", "bailing", "bailing_v2", "breeze", "chatglm2", "chatglm3", "codegeex2", "codegeex4", "dots_ocr", "falcon",
    "fewshot", "gemma2", "glm4", "glm4_5v", "glm4_7", "glm4_moe", "glm4v", "glm_ocr", "glmz1", "gpt_oss", "index",
    "solar", "yi_vl",
)  # fmt: skip
