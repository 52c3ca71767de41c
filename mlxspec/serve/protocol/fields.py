"""The fields that the protocols share, and the options of `Engine.request` that they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mlxspec.defaults import MAX_DRAFT_TOKENS
from mlxspec.errors import MlxspecError
from mlxspec.params import MOST, NAMES, SamplingParams, changed
from mlxspec.serve.core.refusal import Refusal, refusal_of
from mlxspec.serve.core.service import Service
from mlxspec.serve.core.settings import Strategy
from mlxspec.serve.core.wire import require_json

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
JsonObject = Annotated[dict[str, Any], AfterValidator(require_json)]
Share = Annotated[float, Field(ge=0, le=1)]
Effort = Annotated[str, Field(pattern=r"^\w+$")]
DraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | Literal["auto"]


class Fields(BaseModel):
    """Fields of a request. Those that nobody knows are ignored; types are not guessed."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Speculative(Fields):
    """How the text of one request is speculated on."""

    enabled: bool | None = None
    draft_tokens: DraftTokens | None = None
    draft_model: str | None = None
    acceptance_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    trace: bool = False  # whether a stream tells its rounds


class Routing(Fields):
    """Who answers. What is left out is as the server was started; `false` turns a rule off."""

    model_config = ConfigDict(extra="forbid")  # nothing here is ignored

    strategy: Strategy | None = None
    upstream: str | None = None
    max_draft_tokens: MaxTokens | None = None
    min_confidence: Share | None = None
    near_limit: Share | Literal[False] | None = None
    min_chars: MaxTokens | Literal[False] | None = None
    markers: list[Annotated[str, Field(min_length=1)]] | Literal[False] | None = None
    min_logprob: Annotated[float, Field(ge=-1e3, le=0)] | Literal[False] | None = None
    max_entropy: Annotated[float, Field(ge=0, le=1e3)] | Literal[False] | None = None


class StreamOptions(Fields):
    """What a stream has beside its text."""

    include_usage: bool = False


class SamplingFields(Fields):
    """How tokens are chosen. What is left out is as the server was started."""

    temperature: Annotated[float, Field(ge=0, le=MOST)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1 / MOST, le=MOST)] | None = None
    repetition_context_size: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-MOST, le=MOST)] | None = None
    presence_context_size: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-MOST, le=MOST)] | None = None
    frequency_context_size: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-MOST, le=MOST)]] | None = None
    speculative: Speculative | None = None
    routing: Routing | None = None

    @property
    def traces(self) -> bool:
        """Whether a stream of the answer tells its rounds."""
        return self.speculative is not None and self.speculative.trace

    def options(self, service: Service) -> dict[str, Any]:
        """The options `sampling` and `draft_tokens`.

        Raises:
            Refusal: the values do not go together, or the server has no such draft.
        """
        options: dict[str, Any] = {}
        speculative = self.speculative or Speculative()
        _require_draft(service, speculative.draft_model)
        if speculative.draft_tokens is not None:
            options["draft_tokens"] = speculative.draft_tokens
        if speculative.enabled is False:
            options["draft_tokens"] = 0
        given = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        if given.get("top_k") == -1:  # as vLLM's clients say that it is off
            given["top_k"] = 0
        threshold = speculative.acceptance_threshold
        others: dict[str, Any] = {"seed": self.seed, "logit_bias": self._biases()}
        if threshold is not None:
            others |= {"verify": "relaxed", "acceptance_threshold": threshold}
        usual = service.settings.usual.get("sampling", SamplingParams())
        try:
            options["sampling"] = changed(usual, given, **others)
        except MlxspecError as error:
            raise refusal_of(error) from error
        return options

    def _biases(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        strange = [token for token in self.logit_bias if not token.isdecimal()]
        if strange:
            raise Refusal(
                400,
                f"logit_bias names the token {strange[0]!r}; it takes ids, which are numbers.",
                param="logit_bias",
            )
        return {int(token): bias for token, bias in self.logit_bias.items()}


class OpenAIFields(SamplingFields):
    """What OpenAI's two older protocols share."""

    model: str | None = None
    max_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


def may_call(choice: Any) -> bool:
    """Whether the model may call tools, from a `tool_choice` or its type.

    Raises:
        Refusal: it has to call one.
    """
    if choice in (None, "auto", "none"):
        return bool(choice != "none")
    raise Refusal(
        400,
        "tool_choice: a model cannot be made to call a tool. Give auto or none.",
        param="tool_choice",
    )


def _require_draft(service: Service, name: str | None) -> None:
    """Refuse a draft that the server does not have: it is not loaded for one request."""
    draft = service.settings.about.get("draft")
    known = [*service.engine.drafts, *service.engine.heads]
    if name is None or name == draft or known == [name]:
        return
    have = f"It drafts with {draft or ', '.join(known)}." if known else "It has no draft model."
    raise Refusal(
        400,
        f"speculative.draft_model is {name!r}, which this server cannot choose for one request. "
        f"{have} Leave the field out.",
        param="speculative.draft_model",
    )
