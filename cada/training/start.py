"""What a training starts from: the model and its processor, and the splits of the data set."""

from pathlib import Path

from datasets import Dataset, DatasetDict
from huggingface_hub.errors import StrictDataclassError
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from cada.data.loading import hold_out_persons, load_pairs_dataset, shared_persons
from cada.data.pairs import add_attribute_spans, load_tagger
from cada.data.streams import Columns, StreamPairs, open_rows
from cada.files import CADAError, one_line
from cada.hub.convert import convert, convert_processor, default_image_size
from cada.hub.loading import fitted_processor, load_config, load_model, load_processor, load_tokenizer
from cada.training.arguments import CADATrainingArguments, DataArguments, ModelArguments, made_of_arguments
from cada.training.lora import add_lora
from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval, resize_positions
from processing_cada import CADAImageProcessor, CADAProcessor


logger = logging.get_logger(__name__)
_PATCHES = "cada.vision_model.embeddings.position_embedding"
_WORDS = "cada.text_model.embeddings.position_embeddings.weight"


def load_start(path: str, overrides: dict, revision: str | None = None) -> CADAForTextToImageRetrieval:
    """
    A CADA checkpoint with other fields of its configuration. Positions are interpolated to another image size. Of a
    longer `max_position_embeddings` the rows that are there stay, so short texts read as before, and further ones
    begin as copies of them, from the first on (as in Longformer, arXiv 2004.05150, section 5).
    """
    if not overrides:
        return load_model(path, revision)
    old, config = load_config(path, revision), load_config(path, revision, **overrides)
    vision, text = config.vision_config, config.text_config
    size, rows = vision.image_size, text.max_position_embeddings
    old_rows = old.text_config.max_position_embeddings
    if vision.image_height_width == old.vision_config.image_height_width and rows == old_rows:
        return load_model(path, revision, config)
    vision.image_size, text.max_position_embeddings = old.vision_config.image_size, old_rows
    weights = load_model(path, revision, config).state_dict()
    vision.image_size, text.max_position_embeddings = size, rows
    if vision.grid_size != old.vision_config.grid_size:
        weights[_PATCHES] = resize_positions(weights[_PATCHES], old.vision_config.grid_size, vision.grid_size)
        sides = "×".join(map(str, vision.image_height_width))
        logger.warning(f"Position embeddings were interpolated to images of {sides}.")
    if rows > old_rows:
        logger.warning(f"The text positions from {old_rows} on, up to {rows}, begin as copies of the first ones.")
    weights[_WORDS] = weights[_WORDS].repeat(-(-rows // old_rows), 1)[:rows]
    model = CADAForTextToImageRetrieval(config)
    model.load_state_dict(weights)
    return model


def make_model_and_processor(arguments: ModelArguments) -> tuple[CADAForTextToImageRetrieval, CADAProcessor]:
    """
    The model and its processor, from a checkpoint of CADA, from a foreign one, or with random weights.

    Raises:
        CADAError: where the start cannot be used, or its configuration with the overrides does not hold together.
    """
    try:
        if arguments.init_from is not None:
            model, processor = _converted(arguments)
        elif arguments.model_name_or_path is not None:
            model = load_start(arguments.model_name_or_path, arguments.config_overrides, arguments.model_revision)
            saved = load_processor(arguments.model_name_or_path, arguments.model_revision)
            processor = fitted_processor(saved.image_processor, saved.tokenizer, model.config)
        else:
            model, processor = _random(arguments)
    except StrictDataclassError as error:
        raise CADAError(f"The configuration does not hold together. {one_line(error)}") from error
    if arguments.lora_rank is not None:
        add_lora(model, arguments)
    if arguments.attn_implementation is not None:
        with made_of_arguments("The attention"):
            model.set_attn_implementation(arguments.attn_implementation)
    return model, processor


def _converted(arguments: ModelArguments) -> tuple[CADAForTextToImageRetrieval, CADAProcessor]:
    vision = arguments.config_overrides.get("vision_config", {})
    model, report = convert(
        arguments.init_source,
        arguments.init_from,
        vocabulary_head=arguments.vocabulary_head,
        image_size=vision.get("image_size", default_image_size(arguments.init_source)),
        config_overrides=arguments.config_overrides,
        revision=arguments.model_revision,
    )
    logger.warning(f"Start from {arguments.init_from}: {report}")
    return model, convert_processor(model, arguments.tokenizer_name)


def _random(arguments: ModelArguments) -> tuple[CADAForTextToImageRetrieval, CADAProcessor]:
    image_processor = CADAImageProcessor()
    tokenizer = CADAProcessor(image_processor, load_tokenizer(arguments.tokenizer_name)).tokenizer  # with [ENC]
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "enc_token_id": tokenizer.convert_tokens_to_ids("[ENC]"),
        **arguments.config_overrides.get("text_config", {}),
    }
    config = CADAConfig(**{**arguments.config_overrides, "text_config": text})
    logger.warning("The model has random weights: no --model_name_or_path was given.")
    return CADAForTextToImageRetrieval(config), fitted_processor(image_processor, tokenizer, config)


def count_long_captions(dataset: Dataset, processor: CADAProcessor) -> int:
    """Captions with more tokens than the model reads; they are cut."""
    limit = processor.tokenizer.model_max_length
    captions = [caption for row in dataset["captions"] for caption in row]
    lengths = processor(text=captions, truncation=False, padding=False, verbose=False)["input_ids"]
    return sum(len(ids) > limit for ids in lengths)


def load_stream(
    data: DataArguments, args: CADATrainingArguments, processor: CADAProcessor, find_attributes: bool
) -> StreamPairs:
    """
    The streamed pairs of a pre-training.

    Raises:
        CADAError: for arguments that go with no stream, and for data that are not what they should be.
    """
    if not args.do_train or args.do_predict:
        raise CADAError("--streaming is for --do_train alone. Evaluate the model by a second command, on another set.")
    if args.max_steps <= 0:
        raise CADAError("A stream has no epochs. Say by --max_steps how long to train.")
    if data.shuffle_buffer < 1:
        raise CADAError(f"--shuffle_buffer is {data.shuffle_buffer}. Give 1 or more.")
    if args.save_strategy == SaveStrategy.EPOCH:
        logger.warning(
            f"A stream has no epochs: a checkpoint is saved every {args.save_steps:g} steps (--save_steps)."
        )
        args.save_strategy = SaveStrategy.STEPS
    masker = processor.attribute_masker if find_attributes else None
    if masker is not None:
        load_tagger(masker)
    return StreamPairs(
        open_rows(data.dataset, data.data_dir, data.dataset_revision),
        data.dataset,
        Columns(data.image_column, tuple(data.caption_column), data.person_column),
        Path(data.dataset).parent if data.data_dir is None else data.data_dir,
        data.shuffle_buffer,
        processor.image_size,
        masker,
    )


def load_splits(
    data: DataArguments, args: CADATrainingArguments, processor: CADAProcessor, find_attributes: bool
) -> tuple[DatasetDict, int]:
    """
    Load the splits that the run needs; hold persons out for validation where the set has none; find the attributes
    that ARA masks. Returns the splits and how many persons were held out of train.

    Raises:
        CADAError: for a split that is needed and not there, and for damaged data.
    """
    held_out = 0
    if data.holdout_persons < 0:
        raise CADAError(f"--holdout_persons is {data.holdout_persons}. Give 0 or more.")
    with args.main_process_first(desc="loading the data set"):
        needed = {"train": args.do_train, "val": args.do_train or args.do_eval, "test": args.do_predict}
        splits = load_pairs_dataset(
            data.dataset,
            data.data_dir,
            data.captions_per_image,
            data.skip_unreadable,
            revision=data.dataset_revision,
            splits=[split for split, is_needed in needed.items() if is_needed],
        )
        if needed["val"] and "val" not in splits and data.holdout_persons > 0:
            # The same persons whatever the seed of the run, so that runs can be compared.
            held_out = data.holdout_persons
            splits = DatasetDict({**splits, **hold_out_persons(splits["train"], held_out)})
            logger.warning(
                f"{data.dataset} has no validation split: {held_out} persons of train choose the checkpoint "
                "(--holdout_persons)."
            )
        elif args.do_eval and not args.do_train and "val" not in splits:
            raise CADAError(f"{data.dataset} has no split 'val', and --holdout_persons 0 takes no persons of train.")
        if args.do_train and find_attributes:
            splits["train"] = add_attribute_spans(splits["train"], processor.attribute_masker)
    for split, count in shared_persons(splits).items() if args.do_train else ():
        logger.warning(f"{count} persons of train are in {split} too: its scores say little about persons never seen.")
    for split, rows in splits.items():
        long = count_long_captions(rows, processor)
        if long:
            logger.warning(
                f"{split}: {long} captions are longer than {processor.tokenizer.model_max_length} tokens and are cut."
            )
    return splits, held_out
