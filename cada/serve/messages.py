"""
What the service reads and answers, as JSON: its own form for searches, OpenAI's for embeddings, for ranking documents
again that of Cohere and vLLM. Errors have OpenAI's form everywhere.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from processing_cada import clean_caption


MAX_TOP, MAX_RERANK, MAX_CONDITIONS = 1000, 256, 16
MAX_TEXT = 2000  # characters; the model reads 72 words
MAX_INPUTS, MAX_DOCUMENTS = 1000, 64

_PIXEL = (  # a PNG of one red pixel, for the examples
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
DATA_URL = "data:image/"
_VLLM = '`{"content": [{"type": "image_url", "image_url": {"url": "data:image/..."}}]}`'


def _has_words(text: str) -> str:
    if not clean_caption(text):
        raise ValueError("it is empty; describe a person")
    return text


def _text_or_image(text: str) -> str:
    if text.startswith(DATA_URL):
        return text
    if len(text) > MAX_TEXT:
        raise ValueError(f"a text should have at most {MAX_TEXT} characters")
    return _has_words(text)


def _in_a_list(given):
    return [given] if isinstance(given, str) else given


def _address(document):
    """Of an image in the form `_VLLM` its data URL."""
    match document:
        case {"content": [{"type": "image_url", "image_url": {"url": url}}]}:
            return url
        case dict():
            raise ValueError(f"it is no image; one has the form {_VLLM}")
    return document


Text = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_TEXT,
        description='A sentence: more than spaces and the characters . ! " ( ) * # : ; ~, which are not read.',
    ),
    AfterValidator(_has_words),
]
ImageURL = Annotated[
    str,
    Field(pattern=r"^data:image/", description="An image as `data:image/jpeg;base64,...`. Addresses are not fetched."),
]
Input = Annotated[str, Field(min_length=1), AfterValidator(_text_or_image)]
Inputs = Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Name = Annotated[
    str | None, Field(description="Of the model, as `/v1/models` tells. Another one than the service has is an error.")
]
_UNUSED = Field(description="Is not used.")


class Message(BaseModel):
    """A body; fields that it does not name are refused."""

    model_config = ConfigDict(extra="forbid")


def _example(**fields) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [fields]})


class SearchRequest(Message):
    """A sentence, or the image of a person."""

    model_config = _example(sentence="a man in a red coat", top=3)

    sentence: Text | None = None
    image: ImageURL | None = None
    top: Annotated[int, Field(ge=1, le=MAX_TOP, description="Images in the answer.")] = 10
    rerank: Annotated[
        int | None,
        Field(ge=0, le=MAX_RERANK, description="Candidates that the decoder reads; the model's number by default."),
    ] = None
    where: Annotated[
        list[Annotated[str, Field(max_length=MAX_TEXT)]],
        Field(max_length=MAX_CONDITIONS, description="Conditions on metadata, such as `camera=3`. All have to hold."),
    ] = []
    min_probability: Annotated[
        float | None,
        Field(ge=0, le=1, description="Only images that are so probable, perhaps none. For a calibrated model."),
    ] = None

    @model_validator(mode="after")
    def _one_query(self):
        if (self.sentence is None) == (self.image is None):
            raise ValueError("give a `sentence` or an `image`")
        if self.image is not None and self.rerank:
            raise ValueError("`rerank` reads a sentence, and with an `image` there is none; leave it out")
        if self.min_probability is not None and (self.image is not None or self.rerank == 0):
            raise ValueError(
                "`min_probability` needs the decoder, which reads nothing for an `image`, or with `rerank` 0; leave "
                "one of them out"
            )
        return self


class Found(Message):
    """A ranked image."""

    path: Annotated[str, Field(description="Relative to the indexed folder; of a data set its name or row number.")]
    score: Annotated[float, Field(description="S_G + S_L where `stage` is local, S_G where it is global.")]
    stage: Literal["local", "global"]
    metadata: dict[str, int | float | bool | str | None]
    probability: Annotated[
        float | None, Field(description="That it shows the person, of what a calibrated model has read.")
    ] = None
    box: Annotated[
        tuple[int, int, int, int] | None,
        Field(description="Of the person: x, y, width, height in pixels of the upright image; null where it is all."),
    ] = None
    time: Annotated[float | None, Field(description="Of a frame of a video, in seconds.")] = None


class SearchAnswer(Message):
    """The best image first."""

    results: list[Found]
    read_up_to: Annotated[str | None, Field(description="Of a sentence that is too long, the last words read.")] = None
    left_out: Annotated[
        dict[str, str], Field(description="Images that are gone, or have changed since they were indexed, and why.")
    ] = {}


class EmbeddingRequest(Message):
    """Sentences, images as data URLs, or both. OpenAI's form, without arrays of tokens."""

    model_config = _example(input=["a man in a red coat", _PIXEL])

    input: Annotated[
        Inputs,
        BeforeValidator(_in_a_list, json_schema_input_type=Input | Inputs),
        Field(description=f"Texts of at most {MAX_TEXT} characters. What begins with `data:image/` is an image."),
    ]
    model: Name = None
    encoding_format: Annotated[
        Literal["float", "base64"], Field(description="base64: of the numbers as float32, little-endian.")
    ] = "float"
    dimensions: Annotated[int | None, Field(ge=1, description="Only the model's own number.")] = None
    user: Annotated[str | None, _UNUSED] = None


class Embedding(Message):
    """A normalised feature: the product of two is their cosine."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(Message):
    """Word pieces of the texts that were read; images have none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Message):
    """In the order of `input`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class RerankRequest(Message):
    """A sentence, and the images that are ranked by it."""

    model_config = _example(query="a man in a red coat", documents=[_PIXEL], top_n=1)

    query: Text
    documents: Annotated[
        list[Annotated[ImageURL, BeforeValidator(_address, json_schema_input_type=ImageURL | dict)]],
        Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True, description=f"Also in vLLM's form: {_VLLM}."),
    ]
    top_n: Annotated[int | None, Field(ge=1, description="Results in the answer; all by default.")] = None
    model: Name = None
    return_documents: Annotated[bool | None, Field(description="Only false: a result names its document.")] = None
    truncate_prompt_tokens: Annotated[
        int | None, Field(description="Is not used: a query that is too long is an error.")
    ] = None
    max_tokens_per_doc: Annotated[int | None, _UNUSED] = None
    priority: Annotated[int | None, _UNUSED] = None
    user: Annotated[str | None, _UNUSED] = None


class Relevance(Message):
    """A document by its place in `documents`. The score is S_G + S_L, or S_G of a model without match heads."""

    index: int
    relevance_score: float


class RerankAnswer(Message):
    """The best document first."""

    id: str
    model: str
    results: list[Relevance]
    usage: Usage


class Model(Message):
    """The model of the index."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "cada"


class Models(Message):
    """The one model that the service has."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(Message):
    """The service answers requests."""

    status: Literal["ok"] = "ok"


class Problem(Message):
    """What is wrong, and with which part of the request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(Message):
    """An error, in OpenAI's form."""

    error: Problem


_SAID = {  # in place of pydantic's words
    "extra_forbidden": "there is no such field",
    "missing": "it is missing",
    "model_attributes_type": "it is no JSON object; send one, with the header `Content-Type: application/json`",
    "string_pattern_mismatch": (
        "it is no image; addresses are not fetched, so send the image itself as `data:image/jpeg;base64,...`"
    ),
}


def told(problem: dict) -> tuple[str | None, str]:
    """The name of the field that is wrong, `None` for the body, and a sentence, from a `problem` of pydantic's."""
    kind, (_, *path) = problem["type"], problem["loc"]
    said = _SAID.get(kind) or problem["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if kind == "json_invalid":
        path, said = [], f"it is no JSON: {problem['ctx']['error']} at character {path[0]}"
    name = ".".join(map(str, path)) or None
    return name, f"{name or 'The body'}: {said}."
