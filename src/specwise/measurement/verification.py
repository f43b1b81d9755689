"""What two servers answer to the same prompts, token by token, and where the verdict is kept.

The baseline is asked first: greedy outputs (twice, to see whether it agrees with itself), the
logprobs along them, and independent samples. Each candidate is then asked for the same. Logprobs
are never part of a request that is compared: some vLLM versions serve it without drafts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from specwise.domain import Api, Arm, LosslessnessResult, StudyDesign
from specwise.errors import ServerError, StoreError
from specwise.measurement.fleet import Fleet
from specwise.measurement.load import Target
from specwise.measurement.prompts import Prompt, load_source
from specwise.vllm import metrics
from specwise.vllm.outputs import (
    Logprobs,
    TokenOutput,
    generate_body,
    parse_outputs,
    parse_scores,
    score_body,
)
from specwise.vllm.response import endpoint, error_message

EVIDENCE_FILE = "verify.json"
EVIDENCE_SCHEMA = 1

_RESULT = TypeAdapter(LosslessnessResult)

COUNTERS_SETTLE_S: Final = 0.5  # vLLM exports a step's counters after it has answered
_MOST_AT_ONCE: Final = 32  # outputs of one request

Note = Callable[[str], None]
Samples = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class VerifyPlan:
    """What is asked, and how sure the answer shall be.

    ``concurrency`` is how many outputs are generated at once: a draft length that follows the batch
    size must be met at a batch that drafts. ``effect`` is the total variation at every speculated
    token that must not go unseen, ``false_alarm_rate`` that of all sampling tests together.
    ``prompts`` are answered greedily, ``sampling_prompts`` of them sampled.
    """

    greedy: bool = True
    sampling: bool = True
    prompts: int = 24
    greedy_tokens: int = 48
    sampling_prompts: int = 12
    samples: int = 200
    sample_tokens: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    effect: float = 0.1
    false_alarm_rate: float = 0.01
    concurrency: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class VerifyPrompt:
    """A prompt and the endpoint it goes to; ``prompt_id`` is unique within one check."""

    prompt_id: str
    api: Api
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Drafting:
    """A candidate's counters over one phase; None where the server exports none."""

    drafted_tokens: int | None = None
    accepted_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class BaselineAnswers:
    """What the baseline said. Mappings are by prompt id, in the order of asking.

    ``greedy`` carries logprobs where the server gives them, ``scored`` those of the same outputs
    read as prompts. ``samples`` are those of the prompts chosen for sampling.
    """

    greedy: Mapping[str, TokenOutput]
    repeated: Mapping[str, tuple[int, ...]]
    scored: Mapping[str, Logprobs]
    samples: Mapping[str, Samples]


@dataclass(frozen=True, slots=True)
class CandidateAnswers:
    """What a candidate said: the counterpart of `BaselineAnswers`."""

    greedy: Mapping[str, tuple[int, ...]]
    scored: Mapping[str, Logprobs]
    samples: Mapping[str, Samples]
    greedy_drafting: Drafting = field(default_factory=Drafting)
    sampling_drafting: Drafting = field(default_factory=Drafting)


@dataclass(frozen=True, slots=True)
class ArmAnswers:
    """One candidate's answers beside the baseline's, and the vLLM versions that gave them."""

    arm: Arm
    model: str
    baseline: BaselineAnswers
    candidate: CandidateAnswers
    versions: tuple[str | None, str | None]


def collect(
    design: StudyDesign,
    prompts: Sequence[VerifyPrompt],
    plan: VerifyPlan,
    *,
    log_path: Callable[[str], Path],
    known: Mapping[str, Mapping[str, Any]] | None = None,
    note: Note = lambda _: None,
) -> Iterator[ArmAnswers]:
    """Ask the baseline, then every other arm of ``design``, each as soon as it is wanted.

    Starts and stops the servers that the design asks for. ``known`` is how a study's arms were
    served when it was measured. Raises ServerError, EngineError or InputError as `Fleet` does.
    """
    described: dict[str, Mapping[str, Any]] = {}
    with Fleet(
        design,
        known=known or {},
        log_path=log_path,
        on_described=described.update,
        note=note,
    ) as fleet:
        fleet.start()
        first = design.arms[0]
        target = fleet.ready(first)
        with _naming_the_log(fleet, first):
            baseline = ask_baseline(target, prompts, plan, note)
        for number, arm in enumerate(design.arms[1:], start=1):
            its = fleet.ready(arm)
            with _naming_the_log(fleet, arm):
                candidate = ask_candidate(its, prompts, plan, baseline, stream=number, note=note)
            old, new = (
                (described.get(name) or (known or {}).get(name, {})).get("vllm")
                for name in (first.name, arm.name)
            )
            yield ArmAnswers(arm, target.model, baseline, candidate, (old, new))


@contextlib.contextmanager
def _naming_the_log(fleet: Fleet, arm: Arm) -> Iterator[None]:
    """Says where to look when the server of ``arm`` fails."""
    try:
        yield
    except ServerError as error:
        raise ServerError(error.what, f"{error.next_step}{fleet.last_words(arm)}") from error


def prompts_of(design: StudyDesign, base: Path, count: int) -> tuple[VerifyPrompt, ...]:
    """Up to ``count`` prompts of a study, its segments in turn, in an order drawn by its seed.

    Relative paths count from ``base``. Raises PromptError for a source that cannot be used.
    """
    queues: list[list[VerifyPrompt]] = []
    for number, segment in enumerate(s for s in design.segments if not s.same_prompts_as):
        source = load_source(segment.prompts, base, template=segment.template).prompts
        order = np.random.default_rng([design.seed, 13, number]).permutation(len(source))
        queues.append(
            [
                VerifyPrompt(f"{segment.name}/{i}/{source[i].prompt_id}", segment.api, source[i])
                for i in order[:count]
            ]
        )
    turns = (prompt for turn in zip_longest(*queues) for prompt in turn if prompt is not None)
    return tuple(islice(turns, count))


def ask_baseline(
    target: Target, prompts: Sequence[VerifyPrompt], plan: VerifyPlan, note: Note = lambda _: None
) -> BaselineAnswers:
    """Everything the check needs from the baseline; ServerError if it cannot be had.

    Greedy outputs decide which prompts are sampled: those whose tokens are closest to half
    determined, since a nearly determined token shows no change.
    """
    with _Asker(target, plan) as asker:
        asked = prompts[: plan.prompts]
        note(f"baseline: {len(asked)} greedy outputs")
        greedy = asker.greedy(asked, logprobs=True)
        # In another order, so that each output is computed among other neighbours.
        again = asker.greedy(list(reversed(asked))) if plan.greedy else {}
        scored = asker.scored(greedy) if plan.greedy else {}
        samples: dict[str, Samples] = {}
        if plan.sampling:
            chosen = most_informative(greedy, plan.sampling_prompts)
            note(f"baseline: {plan.samples} samples of each of {len(chosen)} prompts")
            by_id = {prompt.prompt_id: prompt for prompt in asked}
            samples = asker.samples([by_id[name] for name in chosen], stream=0)
    return BaselineAnswers(
        greedy=greedy if plan.greedy else {},
        repeated={name: output.tokens for name, output in again.items()},
        scored=scored,
        samples=samples,
    )


def ask_candidate(
    target: Target,
    prompts: Sequence[VerifyPrompt],
    plan: VerifyPlan,
    baseline: BaselineAnswers,
    *,
    stream: int = 1,
    note: Note = lambda _: None,
) -> CandidateAnswers:
    """A candidate's answers to what the baseline was asked; ServerError if they cannot be had.

    ``stream`` numbers the candidate: each is asked in an order of its own.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    greedy: dict[str, TokenOutput] = {}
    scored: dict[str, Logprobs] = {}
    samples: dict[str, Samples] = {}
    greedy_drafting = sampling_drafting = Drafting()
    with _Asker(target, plan) as asker:
        if baseline.greedy:
            note(f"candidate: {len(baseline.greedy)} greedy outputs")
            with _counting(target) as counted:
                greedy = asker.greedy([by_id[name] for name in baseline.greedy])
            greedy_drafting = counted.drafting
            scored = asker.scored(baseline.greedy)
        if baseline.samples:
            note(f"candidate: {plan.samples} samples of each of {len(baseline.samples)} prompts")
            with _counting(target) as counted:
                samples = asker.samples([by_id[name] for name in baseline.samples], stream=stream)
            sampling_drafting = counted.drafting
    return CandidateAnswers(
        greedy={name: output.tokens for name, output in greedy.items()},
        scored=scored,
        samples=samples,
        greedy_drafting=greedy_drafting,
        sampling_drafting=sampling_drafting,
    )


def most_informative(greedy: Mapping[str, TokenOutput], count: int) -> list[str]:
    """The ``count`` prompts whose tokens after the first are closest to half determined.

    By the mean probability of the likeliest token along the greedy output. One of hundreds of
    equal choices hardly shows a change either. Without logprobs, the first ones.
    """

    def distance(name: str) -> float:
        tops = [math.exp(max(at.values())) for at in greedy[name].logprobs[1:] if at]
        return abs(float(np.mean(tops)) - 0.5) if tops else math.inf

    return sorted(greedy, key=distance)[:count]


class _Asker:
    """One server being asked, ``concurrency`` outputs at once. A context manager."""

    def __init__(self, target: Target, plan: VerifyPlan) -> None:
        self._target = target
        self._plan = plan
        self._client = metrics.quiet_client(target.url, verify_tls=target.verify_tls)

    def __enter__(self) -> _Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def greedy(
        self, prompts: Sequence[VerifyPrompt], *, logprobs: bool = False
    ) -> dict[str, TokenOutput]:
        """The greedy output of each prompt; without logprobs where the server refuses them."""

        def bodies(wanted: bool) -> list[tuple[str, dict[str, Any]]]:
            return [
                self._body(p, self._plan.greedy_tokens, temperature=0.0, logprobs=wanted)
                for p in prompts
            ]

        answers = self._post_all(bodies(logprobs), may_refuse=logprobs)
        if any(answer is None for answer in answers):
            answers = self._post_all(bodies(False))
        return {p.prompt_id: self._outputs(a)[0] for p, a in zip(prompts, answers, strict=True)}

    def scored(self, greedy: Mapping[str, TokenOutput]) -> dict[str, Logprobs]:
        """Logprobs of the outputs read as prompts; without those that the server refuses."""
        known = {name: output for name, output in greedy.items() if output.prompt_tokens}
        bodies = [
            (
                endpoint(Api.COMPLETIONS),
                score_body(
                    model=self._target.model, tokens=(*output.prompt_tokens, *output.tokens)
                ),
            )
            for output in known.values()
        ]
        scores: dict[str, Logprobs] = {}
        answers = self._post_all(bodies, may_refuse=True)
        for (name, output), answer in zip(known.items(), answers, strict=True):
            if answer is not None:
                with contextlib.suppress(ValueError):
                    scores[name] = parse_scores(answer, len(output.prompt_tokens))
        return scores

    def samples(self, prompts: Sequence[VerifyPrompt], *, stream: int) -> dict[str, Samples]:
        """``plan.samples`` outputs of each prompt, drawn without seeds as production does.

        Requests go out in an order of ``stream``'s own. Two vLLM servers start with one seed, and
        asked for the same in one order they would draw the same numbers: they would look more
        alike than they are. Seeds in the requests are no way out: vLLM 0.32's CPU build stops when
        the prompt of a seeded request is read in chunks (``v1/worker/gpu_model_runner.py``,
        ``set_offset``).
        """
        plan = self._plan
        at_once = min(_MOST_AT_ONCE, max(1, plan.concurrency // 2))
        sizes = [min(at_once, plan.samples - done) for done in range(0, plan.samples, at_once)]
        turns = [(prompt, size) for size in sizes for prompt in prompts]
        order = np.random.default_rng([plan.seed, 11, stream]).permutation(len(turns))
        turns = [turns[i] for i in order]
        bodies = [
            self._body(prompt, plan.sample_tokens, temperature=plan.temperature, samples=size)
            for prompt, size in turns
        ]
        drawn: dict[str, list[tuple[int, ...]]] = {prompt.prompt_id: [] for prompt in prompts}
        answers = self._post_all(bodies, workers=plan.concurrency // at_once)
        for (prompt, size), answer in zip(turns, answers, strict=True):
            outputs = self._outputs(answer)
            if len(outputs) != size:
                raise ServerError(
                    f"{self._target.url} gave {len(outputs)} of {size} outputs asked for with n.",
                    "Use --concurrency 1, which asks for one at a time.",
                )
            drawn[prompt.prompt_id] += [output.tokens for output in outputs]
        return {name: tuple(outputs) for name, outputs in drawn.items()}

    def _body(
        self,
        prompt: VerifyPrompt,
        max_tokens: int,
        *,
        temperature: float,
        samples: int = 1,
        logprobs: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        chat = prompt.api is Api.CHAT
        return endpoint(prompt.api), generate_body(
            prompt.api,
            model=self._target.model,
            prompt=prompt.prompt.as_messages() if chat else prompt.prompt.as_text(),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=self._plan.top_p if temperature else 1.0,
            samples=samples,
            logprobs=logprobs,
        )

    def _post_all(
        self,
        requests: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        workers: int | None = None,
        may_refuse: bool = False,
    ) -> list[dict[str, Any] | None]:
        """The answers in the order of the requests; None for one refused that may be."""
        with ThreadPoolExecutor(workers or self._plan.concurrency) as pool:
            try:
                return list(pool.map(lambda r: self._post(r[0], r[1], may_refuse), requests))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _post(self, path: str, body: Mapping[str, Any], may_refuse: bool) -> dict[str, Any] | None:
        target = self._target
        try:
            response = self._client.post(
                f"{target.url}{path}",
                content=orjson.dumps(body),
                headers={"Content-Type": "application/json", **target.headers},
                timeout=target.timeout_s,
            )
        except httpx.HTTPError as error:
            raise ServerError(
                f"{target.url} did not answer: {type(error).__name__} {error}.",
                "Check that the server is up; a slow one needs a longer timeout.",
            ) from error
        answer: Any = None
        with contextlib.suppress(orjson.JSONDecodeError):
            answer = orjson.loads(response.content)
        if response.status_code == 200 and isinstance(answer, dict):
            return answer
        if may_refuse and response.status_code in (400, 422):
            return None
        said = error_message(answer)[:200]
        raise ServerError(
            f"{target.url}{path} answers HTTP {response.status_code}{f': {said}' if said else ''}.",
            "Correct the prompts or options, or the server.",
        )

    def _outputs(self, answer: Mapping[str, Any] | None) -> tuple[TokenOutput, ...]:
        try:
            return parse_outputs(answer or {})
        except ValueError as error:
            raise ServerError(
                f"{self._target.url} does not return token ids, so outputs cannot be compared.",
                "The check needs vLLM 0.10.2 or newer (return_token_ids).",
            ) from error


class _Counted:
    """Filled when the counting ends."""

    def __init__(self) -> None:
        self.drafting = Drafting()


@contextlib.contextmanager
def _counting(target: Target) -> Iterator[_Counted]:
    """Counts the drafts of what runs inside it."""
    counted = _Counted()
    before = _scrape(target)
    yield counted
    time.sleep(COUNTERS_SETTLE_S)
    after = _scrape(target)
    if before is None or after is None:
        return
    delta = metrics.difference(before, after)
    if delta.reset:
        raise ServerError(
            f"The server at {target.url} restarted during the check.", "Run the check again."
        )
    drafted = delta.counters.get("spec_draft_tokens")
    accepted = delta.counters.get("spec_accepted_tokens")
    counted.drafting = Drafting(
        drafted_tokens=None if drafted is None else round(drafted),
        accepted_tokens=None if accepted is None else round(accepted),
    )


def _scrape(target: Target) -> metrics.Snapshot | None:
    try:
        return metrics.scrape(target.url, headers=target.headers)
    except ServerError:
        return None  # /metrics is off or closed: what was drafted stays unknown, and is said so


def read_losslessness(folder: Path) -> tuple[LosslessnessResult, ...]:
    """The latest result for each arm of the study in ``folder``; empty if none was ever stored.

    Raises StoreError for a file that is damaged or of another schema.
    """
    path = folder / EVIDENCE_FILE
    try:
        content: Any = orjson.loads(path.read_bytes())
        version = content["schema_version"]
        if version != EVIDENCE_SCHEMA:
            raise StoreError(
                f"{path} was written with schema {version}; this specwise reads {EVIDENCE_SCHEMA}.",
                "Remove it and run `specwise verify` again.",
            )
        return tuple(_RESULT.validate_python(result) for result in content["results"])
    except FileNotFoundError:
        return ()
    except (orjson.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(
            f"{path} is damaged.", "Remove it and run `specwise verify` again."
        ) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error


def write_losslessness(folder: Path, result: LosslessnessResult) -> Path:
    """Store ``result`` beside the study's trials, in place of an earlier one of the same arm."""
    others = [kept for kept in read_losslessness(folder) if kept.arm != result.arm]
    content = {"schema_version": EVIDENCE_SCHEMA, "results": [*others, result]}
    path = folder / EVIDENCE_FILE
    temporary = path.with_suffix(".json.new")
    try:
        temporary.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
    return path
