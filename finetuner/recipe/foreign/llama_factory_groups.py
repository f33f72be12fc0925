"""LLaMA-Factory's keys that mean something only together: rows, template, adapter, packing, times.

hiyouga/LLaMA-Factory src/llamafactory/hparams and data/processor 0.9.5.
"""

from typing import Any

from finetuner.recipe.foreign.llama_factory_chat import chat_template
from finetuner.recipe.foreign.llama_factory_rows import rewrite_datasets
from finetuner.recipe.foreign.llama_factory_templates import TEMPLATES, WITHOUT_AN_END, ForeignTemplate, Settings
from finetuner.recipe.foreign.rewriting import Rewriting
from finetuner.recipe.foreign.trainers import rewrite_schedule, rewrite_times, rewrite_trackers, rewrite_uploads
from finetuner.recipe.problems import did_you_mean

_OWN_TEMPLATE = "Write `chat_template: tokenizer_default` in its place for the tokenizer's own, or chat_template_jinja."

_SWITCHES = (
    "mask_history train_on_prompt packing neat_packing double_quantization create_new_adapter use_dft_loss "
    "use_eaft_loss use_asft_loss enable_thinking preserve_thinking push_to_hub do_train do_eval do_predict streaming "
    "overwrite_output_dir bf16 fp16"
)


def rewrite_llama_factory(rewriting: Rewriting) -> None:
    """Rewrite all of LLaMA-Factory's keys that depend on one another; the others mean something by themselves."""
    rewriting.require_truth(_SWITCHES)
    is_text = rewriting.get("stage") == "pt"
    if is_text:
        rewriting.take("stage", into="datasets.type")
    masks_history = rewriting.take("mask_history", into="chat_template_jinja") is True
    if masks_history and rewriting.get("train_on_prompt") is True:
        rewriting.refuse(
            "train_on_prompt", "mask_history and train_on_prompt contradict each other, there as well. Remove one."
        )
    elif rewriting.get("train_on_prompt") is True:
        rewriting.remark(
            "with train_on_prompt LLaMA-Factory divides the loss by the first token of each row too, which no position "
            "predicts: its losses and gradients are smaller by that share; here it is the mean over what is learned"
        )
    is_named = rewriting.get("template") is not None and rewriting.get("chat_template") is None
    merges_results = rewrite_datasets(rewriting, is_text=is_text, only_last_turn=masks_history and not is_named)
    if is_text:
        _no_template(rewriting)
    else:
        _template(rewriting, masks_history=masks_history, merges_results=merges_results)
    _packing(rewriting, is_text=is_text)
    _adapter(rewriting)
    _earlier_adapter(rewriting)
    _loss(rewriting, is_text=is_text)
    _new_tokens(rewriting)
    if rewriting.get("fp16") is not True:
        rewriting.defaults["bf16"] = False
    rewrite_schedule(rewriting)
    _times(rewriting)
    rewrite_uploads(rewriting)
    rewrite_trackers(rewriting)
    reason = "it would delete an earlier run here; LLaMA-Factory writes beside it: write it yourself if that is meant"
    rewriting.ignore("overwrite_output_dir", reason)


def _no_template(rewriting: Rewriting) -> None:
    for key in ("template", "default_system", "enable_thinking", "preserve_thinking", "tool_format"):
        rewriting.ignore(key, "plain text has no template")


def _template(rewriting: Rewriting, *, masks_history: bool, merges_results: bool) -> None:
    name, given = rewriting.get("template"), rewriting.document.values
    if not isinstance(rewriting.get("default_system", ""), str):
        rewriting.refuse("default_system", "default_system must be text: the system turn of rows that have none.")
    settings = Settings(
        default_system=rewriting.get("default_system"),
        enable_thinking=given.get("enable_thinking", True),
        preserve_thinking=rewriting.get("preserve_thinking") is True,
        mask_history=masks_history,
        merges_results=merges_results,
    )
    is_own = name is None or rewriting.get("chat_template") is not None
    if is_own and settings.default_system is not None:
        rewriting.refuse("default_system", f"default_system is that of a named template. {_INTO_ROWS}")
    if rewriting.get("tool_format") is not None:
        rewriting.refuse(
            "tool_format", "tool_format is not supported yet: another template's form of tools. Remove it."
        )
    for key in ("default_system", "enable_thinking", "preserve_thinking", "tool_format"):
        rewriting.take(key, into="chat_template_jinja")
    if is_own:
        rewriting.ignore("template", "chat_template says the template", loud=True)
        if name is None:
            rewriting.defaults["chat_template"] = "tokenizer_default"
            rewriting.remark(
                "no template is named: the tokenizer's own writes the conversations, and answers are learned with the "
                "token that ends them; LLaMA-Factory makes a template out of what it sees of the tokenizer's own"
            )
        return
    known = TEMPLATES.get(name) if isinstance(name, str) else None
    if known is None:
        rewriting.refuse("template", _refusal(str(name)))
        return
    _put_template(rewriting, str(name), known, settings)


_INTO_ROWS = "Write the system text into the rows, or name a template."


def _refusal(name: str) -> str:
    if name in WITHOUT_AN_END:
        return (
            f"template: '{name}' is not supported yet: LLaMA-Factory teaches the end of an answer as the label of the "
            f"next turn's first token. {_OWN_TEMPLATE}"
        )
    return f"template: '{name}' is not supported yet: this template. {_OWN_TEMPLATE}{did_you_mean(name, TEMPLATES)}"


def _put_template(rewriting: Rewriting, name: str, template: ForeignTemplate, settings: Settings) -> None:
    rewriting.put("chat_template", "jinja", of="template", quiet=True)
    rewriting.put("chat_template_jinja", chat_template(template, settings), of="template", quiet=True)
    if template.end is not None:
        tokens = rewriting.get("special_tokens", {})
        if isinstance(tokens, dict) and "eos_token" not in tokens:
            rewriting.put("special_tokens", {**tokens, "eos_token": template.end}, of="template", quiet=True)
    rewriting.take("template")
    system = template.system if settings.default_system is None else settings.default_system
    says = [f"rows without a system text have '{system.strip()[:60]}'"] if system else []
    if template.thoughts is not None and settings.enable_thinking:
        says.append("an empty thought is learned before answers that have none")
    elif template.thoughts is not None:
        says.append("an empty thought stands, unlearned, before answers that have none")
    if settings.mask_history:
        says.append("the last answer alone is learned")
    if template.shape.assistant.endswith("\n"):
        says.append("the newline behind an answer's end is learned")
    rewriting.remark(
        f"chat_template_jinja writes and learns what LLaMA-Factory's template '{name}' does"
        + "".join(f"; {one}" for one in says)
        + ". It is saved with the result, where LLaMA-Factory would keep the tokenizer's own"
    )


def _packing(rewriting: Rewriting, *, is_text: bool) -> None:
    packs, neatly = rewriting.take("packing"), rewriting.take("neat_packing") is True
    if is_text:
        rewriting.defaults["excess_length_strategy"] = "split" if packs is not False else "truncate"
        if packs is not False:
            rewriting.defaults["sample_packing"] = True
            rewriting.defaults["pretrain_multipack_attn"] = False
            rewriting.remark(
                "texts are packed whole, those longer than sequence_len in parts; LLaMA-Factory joins all texts and "
                "cuts them every sequence_len tokens. Each token sees all that stands before it, there and here"
            )
        return
    if neatly or packs:
        rewriting.put("sample_packing", True, of="neat_packing" if neatly else "packing")
    if packs and not neatly:
        rewriting.remark(
            "packing: rows that are packed together do not see each other here; in LLaMA-Factory they do, unless "
            "neat_packing is true"
        )
    rewriting.remark(
        "a row longer than cutoff_len is cut at its end; LLaMA-Factory cuts questions and answers in proportion, turn "
        "by turn"
    )


def _adapter(rewriting: Rewriting) -> None:
    kind = rewriting.take("finetuning_type", into="adapter")
    bits = rewriting.take("quantization_bit", into="load_in_4bit")
    _four_bits(rewriting, is_used=bits == 4 and kind in (None, "lora"))
    if kind in ("freeze", "oft"):
        advice = "Write full, with unfrozen_parameters." if kind == "freeze" else "Write lora."
        rewriting.refuse("finetuning_type", f"finetuning_type: '{kind}' is not supported yet. {advice}")
        return
    if kind not in (None, "lora", "full"):
        rewriting.refuse("finetuning_type", f"finetuning_type is {kind!r:.40}, and can be lora or full.")
        return
    if bits not in (None, 4, 8):
        rewriting.refuse("quantization_bit", f"quantization_bit: {bits!r:.20} is not supported yet. Write 4 or 8.")
    if kind == "full":
        for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target"):
            rewriting.ignore(key, "finetuning_type is full")
        rewriting.put("adapter", None, of="finetuning_type", quiet=True)
        if bits is not None:
            rewriting.refuse("quantization_bit", "quantization_bit needs finetuning_type: lora.")
    else:
        adapter = "qlora" if bits == 4 else "lora"
        if kind is None and bits != 4:
            rewriting.defaults["adapter"] = adapter
        else:
            rewriting.put("adapter", adapter, of="finetuning_type" if kind else "quantization_bit", quiet=True)
        if bits == 8:
            rewriting.put("load_in_8bit", True, of="quantization_bit", quiet=True)
        rank = rewriting.get("lora_rank", 8)
        if isinstance(rank, int):
            rewriting.defaults["lora_alpha"] = 2 * rank
        if rewriting.get("lora_target") is None:
            rewriting.defaults["lora_target_linear"] = True


def _four_bits(rewriting: Rewriting, *, is_used: bool) -> None:
    formats: dict[str, Any] = {}
    kind, twice = rewriting.take("quantization_type"), rewriting.take("double_quantization")
    if kind not in (None, "nf4"):
        formats["bnb_4bit_quant_type"] = kind
    if twice is False:
        formats["bnb_4bit_use_double_quant"] = False
    if is_used and formats:
        of = "double_quantization" if twice is False else "quantization_type"
        rewriting.put("bnb_config_kwargs", formats, of=of)


def _earlier_adapter(rewriting: Rewriting) -> None:
    earlier, is_new = rewriting.get("adapter_name_or_path"), rewriting.take("create_new_adapter") is True
    if earlier is None:
        rewriting.take("adapter_name_or_path")
    elif not isinstance(earlier, str) or "," in earlier or is_new:
        rewriting.refuse(
            "adapter_name_or_path",
            "adapter_name_or_path: training a new adapter on top of others is not supported yet. Merge them into the "
            "model first (finetuner merge), and name the merged model.",
        )


def _loss(rewriting: Rewriting, *, is_text: bool) -> None:
    switches = {"use_dft_loss": "probability", "use_eaft_loss": "entropy"}
    asked = [key for key in (*switches, "use_asft_loss") if rewriting.get(key) is True]
    if is_text:
        for key in asked:
            rewriting.ignore(key, "LLaMA-Factory weighs the tokens of stage sft alone", loud=True)
    elif len(asked) > 1:
        rewriting.refuse(asked[1], f"{asked[0]} and {asked[1]} are two losses, of which one is taken. Remove one.")
    if asked == ["use_eaft_loss"] and not is_text:
        rewriting.put("loss_weighting_exponent", rewriting.take("eaft_alpha", 1.0), of="use_eaft_loss", quiet=True)
    rewriting.ignore("eaft_alpha", "it belongs to use_eaft_loss, which is not on")
    for key, weighting in switches.items():
        if rewriting.take(key) is True:
            rewriting.put("loss_weighting", weighting, of=key)
            rewriting.remark("the held-out loss is that of the tokens, without their weights; LLaMA-Factory's has them")


def _new_tokens(rewriting: Rewriting) -> None:
    tokens: list[str] = []
    for key in ("add_tokens", "add_special_tokens"):
        named = rewriting.take(key, into="tokens")
        if isinstance(named, str):
            tokens += [token.strip() for token in named.split(",")]
        elif named is not None:
            rewriting.refuse(key, f"{key} must be tokens with commas between them.")
        if named is not None and tokens:
            rewriting.put("tokens", tokens, of=key, quiet=True)


def _times(rewriting: Rewriting) -> None:
    holds_out = rewriting.get("val_size") or rewriting.get("test_datasets")
    evaluates = rewriting.get("eval_strategy", rewriting.get("evaluation_strategy"))
    rewrite_times(rewriting)
    if holds_out and evaluates is None:
        if rewriting.get("do_eval") is True:
            rewriting.remark(
                "held-out rows are looked at once an epoch; LLaMA-Factory would do so after training alone"
            )
        else:
            rewriting.defaults["eval_strategy"] = "no"
    elif not holds_out:
        rewriting.defaults.pop("eval_steps", None)
        rewriting.defaults.pop("eval_batch_size", None)
