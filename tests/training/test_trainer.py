"""The Trainer of CADA and its arguments, in Python and through the command a researcher types."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import save_colour_set, tiny_batch, tiny_config, training_command
from datasets import Value
from pedes_layout import LAYOUTS

import train_cada
from cada.data.loading import load_pairs_dataset
from cada.data.pairs import PairCollator, PairDataset, add_attribute_spans
from cada.files import CADAError
from cada.training.arguments import CADATrainingArguments
from cada.training.trainer import CADATrainer
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import AttributeMasker, CADAProcessor


def test_defaults_are_the_recipe_of_the_paper(tmp_path):
    args = CADATrainingArguments(output_dir=str(tmp_path), do_train=True)
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (1e-5, 0.05, 40)
    assert args.per_device_train_batch_size == 96
    assert args.lr_scheduler_type == "cosine"
    assert args.optim in ("adamw_torch", "adamw_torch_fused")
    assert args.negative_sampling == "hardest"
    assert args.load_best_model_at_end and args.metric_for_best_model == "local_R1" and args.greater_is_better


def test_annealed_temperature_falls_from_start_to_end(tmp_path):
    args = CADATrainingArguments(
        output_dir=str(tmp_path),
        negative_sampling="annealed",
        negative_temperature_start=10.0,
        negative_temperature_end=0.1,
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    trainer = CADATrainer(model=CADAForTextToImageRetrieval(tiny_config()), args=args)
    trainer.state.max_steps = 101
    temperatures = []
    for step in (0, 50, 100):
        trainer.state.global_step = step
        temperatures.append(trainer.negative_temperature())
    assert temperatures == pytest.approx([10.0, 1.0, 0.1])
    args.negative_sampling = "hardest"
    assert trainer.negative_temperature() is None


def test_label_noise_robust_is_for_the_model(tmp_path):
    model, batch = CADAForTextToImageRetrieval(tiny_config()), tiny_batch(batch=8)
    options = {"output_dir": str(tmp_path), "eval_strategy": "no", "load_best_model_at_end": False}
    computed = []
    for robust in (False, True):
        args = CADATrainingArguments(label_noise_robust=robust, use_cpu=True, **options)
        computed.append(CADATrainer(model=model, args=args).compute_loss(model, batch).item())
        assert computed[-1] == model(**batch, label_noise_robust=robust).loss.item()
    assert computed[0] != computed[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negative_sampling": "soft"}, "negative_sampling"),
        ({"negative_temperature_start": 0.1, "negative_temperature_end": 1.0}, "negative_temperature_start"),
        ({"negative_temperature_end": 0.0}, "negative_temperature_end"),
        ({"negative_temperature_start": float("inf")}, "negative_temperature_start"),
        ({"adam_epsilon": float("inf")}, "adam_epsilon"),
        ({"rerank_memory": 0.0}, "rerank_memory"),
        ({"rerank_memory": float("inf")}, "rerank_memory"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"save_steps": float("inf")}, "save_steps"),
        ({"data_seed": -1}, "data_seed"),
        ({"enable_jit_checkpoint": True}, "has no place in this training"),
        ({"use_liger_kernel": True}, "has no place in this training"),
        ({"hub_strategy": "every_save"}, "has no place in this training"),
    ],
)
def test_training_arguments_are_checked(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        CADATrainingArguments(output_dir=str(tmp_path), **fields)


def test_mistakes_that_show_in_a_part_alone_are_named(start, tmp_path):
    """Wrong values that the library takes and PyTorch does not, when the optimizer or a loader is made."""
    LAYOUTS["rstp_reid"](tmp_path)
    mistakes = {
        "The attention": ["--attn_implementation", "no_such_attention"],
        "The data loader": ["--dataloader_persistent_workers", "true"],
        "The optimizer": ["--adam_beta1", "2"],
        "The learning rate schedule": ["--lr_scheduler_kwargs", '{"no_such_argument": 1}'],
    }
    for part, more in mistakes.items():
        with pytest.raises(CADAError, match=f"{part} cannot be made of these arguments"):
            train_cada.main([*training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_train"), *more])


NO_DROPOUT = '{"text_config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}'


def test_gradient_checkpointing_gives_the_same_weights(start, tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    LAYOUTS["rstp_reid"](data_dir)
    weights = []
    for number, more in enumerate(((), ("--activation_checkpointing",))):
        words = training_command(start, tmp_path / str(number), "rstp_reid", data_dir, "--do_train", *more)
        train_cada.main([*words, "--config_overrides", NO_DROPOUT])
        weights.append(CADAForTextToImageRetrieval.from_pretrained(tmp_path / str(number)).state_dict())
    first = CADAForTextToImageRetrieval.from_pretrained(start).state_dict()
    assert any((weights[0][name] - value).abs().max() > 1e-3 for name, value in first.items())
    for name, value in weights[0].items():
        # AdamW divides by the size of a gradient: where that is rounding error, so is the step.
        assert (weights[1][name] - value).abs().mean() < 1e-5, name


@pytest.mark.slow  # the compiler takes some minutes
def test_compiled_training_gives_the_same_weights(start, tmp_path, empty_compiler_cache):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    LAYOUTS["cuhk_pedes"](data_dir)
    weights, losses = {}, {}
    for name, more in {"plain": (), "compiled": ("--torch_compile",)}.items():
        arguments = training_command(
            start, tmp_path / name, "cuhk_pedes", data_dir, "--do_train", "--max_steps", "2", *more
        )
        arguments += ["--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
        arguments += ["--load_best_model_at_end", "false"]
        arguments += ["--optim", "sgd", "--learning_rate", "0.01"]  # AdamW makes rounding errors as large as gradients
        train_cada.main([*arguments, "--config_overrides", NO_DROPOUT])
        weights[name] = CADAForTextToImageRetrieval.from_pretrained(tmp_path / name).state_dict()
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)
    torch.testing.assert_close(weights["compiled"], weights["plain"], rtol=0, atol=1e-5)
    first = CADAForTextToImageRetrieval.from_pretrained(start).state_dict()
    assert any((weights["plain"][name] - value).abs().max() > 1e-4 for name, value in first.items())


def test_processor_is_saved_with_every_checkpoint(start, tmp_path):
    LAYOUTS["rstp_reid"](tmp_path)
    train_cada.main(training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_train"))
    for folder in (tmp_path / "run", *(tmp_path / "run").glob("checkpoint-*")):
        assert CADAProcessor.from_pretrained(folder).enc_token_id == 30523
        assert (folder / "model.safetensors").is_file()


@pytest.fixture
def trainer(start, tmp_path):
    """Makes a Trainer of seven persons as a program would; what it is given takes the place of the usual."""
    splits = load_pairs_dataset(str(save_colour_set(tmp_path / "data", train=17, val=9, test=11)))
    processor = CADAProcessor.from_pretrained(start)

    def make(**given):
        usual = {
            "model": CADAForTextToImageRetrieval.from_pretrained(start),
            "args": arguments(tmp_path),
            "train_dataset": PairDataset(add_attribute_spans(splits["train"], processor.attribute_masker)),
            "eval_dataset": splits["val"],
            "data_collator": PairCollator(processor),
            "processing_class": processor,
        }
        return CADATrainer(**{**usual, **given})

    return make


def arguments(folder: Path, **given) -> CADATrainingArguments:
    usual = {"per_device_train_batch_size": 6, "num_train_epochs": 2, "learning_rate": 5e-3, "disable_tqdm": True}
    return CADATrainingArguments(str(folder / "run"), use_cpu=True, **{**usual, **given})


def test_training_in_python_as_documented(start, tmp_path, monkeypatch):
    """The block of docs/train.md, with a set and a batch that are small: validation chooses, without `do_train`."""
    page = (Path(__file__).parents[2] / "docs/train.md").read_text(encoding="utf-8")
    code = page.split("## In Python")[1].split("```python\n")[1].split("```")[0]
    data = save_colour_set(tmp_path / "data", train=17, val=9, test=11)
    for old, new in (
        ('"cuhk_pedes", "/data/CUHK-PEDES"', repr(str(data))),
        ('CADATrainingArguments("runs/cuhk")', "small_arguments"),
        ("print", "scores.append"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    names = {
        "model": CADAForTextToImageRetrieval.from_pretrained(start),
        "processor": CADAProcessor.from_pretrained(start),
        "small_arguments": arguments(tmp_path),
        "scores": [],
    }
    exec(code, names)
    state = names["trainer"].state
    assert Path(state.best_model_checkpoint).parent == tmp_path / "run"
    assert [entry["step"] for entry in state.log_history if "eval_local_R1" in entry][:2] == [2, 4]
    assert names["scores"] == [state.best_metric]


def test_several_sets_and_none_are_evaluated(trainer, tmp_path):
    several = trainer()
    both = several.evaluate({"one": several.eval_dataset, "two": several.eval_dataset})
    alone = several.evaluate()
    assert both["eval_one_local_mAP"] == both["eval_two_local_mAP"] == alone["eval_local_mAP"]
    assert several.predict(several.eval_dataset).metrics["test_local_mAP"] == alone["eval_local_mAP"]
    without = trainer(args=arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False), eval_dataset=None)
    with pytest.raises(CADAError, match="no set to evaluate on"):
        without.evaluate()


def test_several_sets_are_evaluated_in_a_training(trainer, tmp_path):
    """Both after every epoch; no checkpoint is chosen."""
    sets = {name: trainer().eval_dataset for name in ("a", "b")}
    training = trainer(args=arguments(tmp_path, load_best_model_at_end=False), eval_dataset=sets)
    training.train()
    scores = [entry for entry in training.state.log_history if any(key.endswith("local_R1") for key in entry)]
    assert [(entry["step"], *(name for name in sets if f"eval_{name}_local_R1" in entry)) for entry in scores] == [
        (2, "a"),
        (2, "b"),
        (4, "a"),
        (4, "b"),
    ]
    assert training.state.best_model_checkpoint is None


def test_persons_that_are_texts_are_named(trainer):
    one = trainer()
    rows = one.eval_dataset.cast_column("person_id", Value("string"))
    with pytest.raises(CADAError, match="Row 0: `person_id` is the text .* Give a whole number"):
        one.evaluate(rows)


def test_what_a_trainer_cannot_take_is_named(trainer, start, tmp_path):
    with pytest.raises(CADAError, match="17 pairs, less than one batch of 18"):
        trainer(args=arguments(tmp_path, per_device_train_batch_size=18))
    with pytest.raises(CADAError, match="Several sets choose no checkpoint"):
        trainer(eval_dataset={"one": trainer().eval_dataset})
    with pytest.raises(CADAError, match="compute_metrics"):
        trainer(compute_metrics=lambda _: {})
    processor = CADAProcessor.from_pretrained(start)
    processor.attribute_masker = AttributeMasker("phrase", 0.1)
    with pytest.raises(CADAError, match="masks phrases at a rate of 0.1, and the model's configuration says"):
        trainer(processing_class=processor)
    with pytest.raises(CADAError, match="Name it by `hub_tag`"):
        trainer().push_to_hub(revision="dev")
    with pytest.raises(CADAError, match="no `attribute_spans`.*add_attribute_spans"):
        PairCollator(processor)([{"image": None, "caption": "a red coat"}])


def test_sigterm_does_what_it_did_before_a_training_that_failed(trainer, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def fail(*_, **__):
        assert signal.getsignal(signal.SIGTERM) != before
        raise OSError("the disk is gone")

    failing = trainer()
    monkeypatch.setattr(failing, "training_step", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        failing.train()
    assert signal.getsignal(signal.SIGTERM) == before


def test_fields_of_a_file_are_read_once(start, tmp_path, monkeypatch):
    """The record holds the fields that the model has, also where their file is gone when it is written."""
    LAYOUTS["rstp_reid"](tmp_path)
    fields = tmp_path / "fields.json"
    fields.write_text('{"mask_rate": 0.4}')
    load = train_cada.make_model_and_processor
    monkeypatch.setattr(train_cada, "make_model_and_processor", lambda given: (load(given), fields.unlink())[0])
    words = training_command(start, tmp_path / "run", "rstp_reid", tmp_path, "--do_train", "--max_steps", "1")
    train_cada.main([*words, "--config_overrides", str(fields)])
    record = json.loads((tmp_path / "run" / "cada_run.json").read_text())
    assert record["training"]["recipe"]["config_overrides"] == {"mask_rate": 0.4}
