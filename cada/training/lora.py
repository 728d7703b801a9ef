"""Fine-tuning with less: LoRA (Hu et al., 2021, arXiv 2106.09685) by PEFT. The run leaves an adapter."""

import os
from pathlib import Path

from safetensors.torch import load_file
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, is_peft_available

from cada.files import CADAError
from cada.hub.loading import commit_of, find_adapter
from cada.training.arguments import CADATrainingArguments, ModelArguments
from modeling_cada import CADAForTextToImageRetrieval


# The attention of both towers and the cross-attention. The MLPs too brought no more: benchmarks/lora.md.
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
# The heads are small, and a converted BLIP has new ones: trained whole. The words and the output tied to them stay.
HEADS = ["visual_projection", "text_projection", "match_head", "group_match_head", "vocabulary_head.dense"]


def check_lora(arguments: ModelArguments, args: CADATrainingArguments) -> None:
    """
    What goes with an adapter, and with `--lora_rank`, which makes one.

    Raises:
        CADAError: names the argument.
    """
    start, rank = arguments.model_name_or_path, arguments.lora_rank
    is_adapter = start is not None and find_adapter(start, arguments.model_revision) is not None
    if rank is not None and not is_peft_available():
        raise CADAError('--lora_rank needs PEFT. In a clone run: pip install -e ".[peft]"')
    if rank is not None and (start is None or not args.do_train):
        raise CADAError("--lora_rank goes with --do_train and a --model_name_or_path, on which the adapter rests.")
    if is_adapter and args.do_train:
        raise CADAError(f"{start} is an adapter. To train on, merge it first: cada merge {start} --out FOLDER.")
    if (is_adapter or rank is not None) and arguments.config_overrides:
        raise CADAError(
            "An adapter has the configuration of its base: leave --config_overrides out, or change the config.json of "
            "the base."
        )
    if rank is not None and args.push_to_hub and os.path.isdir(start):
        raise CADAError(
            f"--push_to_hub: nobody else has {start}, on which the adapter rests. Publish that first and give its "
            "name on the Hub as --model_name_or_path; or leave it out, and publish what `cada merge` makes."
        )


def add_lora(model: CADAForTextToImageRetrieval, arguments: ModelArguments) -> None:
    """Freeze the model and put an adapter of `lora_rank` r into it: W + 2 B A; A (r, .) is random, B (., r) is 0."""
    from peft import LoraConfig

    base, rank = arguments.model_name_or_path, arguments.lora_rank
    heads = [name for name in HEADS if hasattr(model, name.split(".")[0]) or hasattr(model.cada, name)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, modules_to_save=heads)
    model.add_adapter(config)
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.revision = commit_of(base, arguments.model_revision)


def load_lora(model: CADAForTextToImageRetrieval, checkpoint: str | os.PathLike) -> None:
    """Put the weights of a checkpoint's adapter into the one that the model has."""
    from peft import set_peft_model_state_dict

    weights = load_file(Path(checkpoint, ADAPTER_SAFE_WEIGHTS_NAME))
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): w for name, w in weights.items()})
