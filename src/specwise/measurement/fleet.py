"""The servers of a study's arms: one serves, the others keep still.

Servers that specwise starts stay in memory together when the design says so and are suspended
while another arm runs, because an idle vLLM keeps spinning and would slow its neighbour; otherwise
only one runs at a time. Servers given by URL are left alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from specwise.domain import Arm, Deployment, Speculation, StudyDesign
from specwise.errors import InputError, ServerError
from specwise.facts.bundled import bundled_draft, bundled_target, padded_target
from specwise.facts.quantise import Scheme, quantised_checkpoint
from specwise.measurement.load import Target
from specwise.measurement.provenance import describe_model
from specwise.vllm.engine import cache_folder
from specwise.vllm.server import EMBEDDED, Capabilities, Server, probe

RETURN_PATIENCE_S = 60.0


class Fleet:
    """Brings the right server up for each trial; a context manager that leaves nothing running.

    ``known`` is how each arm was served in earlier sittings; ``on_described`` gets
    the same, up to date, whenever a server was looked at. At most ``most_servers`` are held in
    memory: of those that specwise started, the one that served longest ago makes room, the
    baseline's last. ``start_s`` is what starting each arm's server has taken so far, in seconds,
    all its starts together and those that failed too.
    """

    def __init__(
        self,
        design: StudyDesign,
        *,
        known: Mapping[str, Mapping[str, Any]],
        log_path: Callable[[str], Path],
        on_described: Callable[[Mapping[str, Mapping[str, Any]]], None],
        note: Callable[[str], None],
        most_servers: int | None = None,
    ) -> None:
        self._design = design
        self._most_servers = most_servers
        self._described = {name: dict(values) for name, values in known.items()}
        self._on_described = on_described
        self._log_path = log_path
        self._note = note
        self._servers: dict[str, Server] = {}
        self._targets: dict[str, Target] = {}
        self._launched_at: dict[str, float] = {}
        self.start_s: dict[str, float] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers.values():
            server.stop()

    def start(self) -> None:
        """Bring up every arm before the first trial, so that a wrong one is found at once.

        Servers of the embedded engine start side by side, which halves the wait. Others start one
        by one: a vLLM on a GPU sizes its KV cache by the memory it finds free.
        """
        if self._design.servers_together:
            for arm in self._design.arms:
                if arm.deployment is not None and arm.deployment.engine == EMBEDDED:
                    self._launch(arm, arm.deployment)
        for arm in self._design.arms:
            if arm.url is not None or self._design.servers_together:
                self.ready(arm)

    def ready(self, arm: Arm) -> Target:
        """Where requests of ``arm`` go, its server being up and the others still.

        Raises ServerError if it cannot be brought up, InputError if it is not what the design says.
        """
        if arm.deployment is None:
            return self._given(arm)
        self._quieten(arm)
        server = self._servers.get(arm.name)
        known = arm.name in self._targets
        if server is not None and known and _goes_on(server):
            self._servers[arm.name] = self._servers.pop(arm.name)  # the order is that of use
            return self._targets[arm.name]
        if server is None or known:  # else launched by `start`, not waited for yet
            server = self._launch(arm, arm.deployment)
        return self._introduce(arm, arm.deployment, server)

    @property
    def running(self) -> frozenset[str]:
        """Arms whose server is up, suspended or not; the others must be started first."""
        return frozenset(name for name in self._targets if self.alive(self._design.arm(name)))

    def retire(self, name: str) -> None:
        """Stop the server of an arm; nothing if specwise has none running for it."""
        server = self._servers.pop(name, None)
        if server is not None:
            self._targets.pop(name, None)
            self._note(f"stopping the server of arm {name}")
            server.stop()

    def _make_room(self) -> None:
        baseline = self._design.arms[0].name
        while self._most_servers is not None and len(self._servers) >= self._most_servers:
            # In the order of use; the baseline only where nothing else is left.
            self.retire(min(self._servers, key=lambda name: name == baseline))

    def _quieten(self, arm: Arm) -> None:
        """Suspend, or stop, every server that is up and not that of ``arm``."""
        for name in [name for name in self._targets if name != arm.name and name in self._servers]:
            if not self._design.servers_together:
                self._servers.pop(name).stop()
            else:
                with contextlib.suppress(ServerError):  # a dead one is still as well
                    self._servers[name].suspend()

    def alive(self, arm: Arm) -> bool:
        """Whether the server of ``arm`` is not known to have died."""
        if arm.url is not None:
            return True
        server = self._servers.get(arm.name)
        return server is not None and server.alive

    def last_words(self, arm: Arm) -> str:
        """Where to look for why a server failed, as the end of a sentence; may be empty."""
        return "" if arm.url is not None else f" Its log: {self._log_path(arm.name)}"

    def _launch(self, arm: Arm, deployment: Deployment) -> Server:
        """Start the server of ``arm`` without waiting for it."""
        self._launched_at[arm.name] = time.monotonic()
        self._targets.pop(arm.name, None)
        dead = self._servers.pop(arm.name, None)
        if dead is not None:
            dead.stop()  # its workers and its watchdog may have outlived it
        self._make_room()
        self._note(f"starting the server of arm {arm.name} ({deployment.model})")
        server = Server.start(
            replace(
                deployment,
                model=resolve_model(deployment.model),
                served_name=deployment.served_name or deployment.model,
            ),
            self._resolve_draft(arm.speculation),
            log_path=self._log_path(arm.name),
        )
        self._servers[arm.name] = server
        return server

    def _introduce(self, arm: Arm, deployment: Deployment, server: Server) -> Target:
        """Wait for a server that was launched, look at it, and remember where it is."""
        began = time.monotonic()
        try:
            server.wait_ready()
        finally:
            took_s = time.monotonic() - self._launched_at[arm.name]
            self.start_s[arm.name] = self.start_s.get(arm.name, 0.0) + took_s
        self._note(f"arm {arm.name} is up, waited {time.monotonic() - began:.0f} s")
        capabilities = probe(server.url, model=server.model)
        self._targets[arm.name] = Target(
            url=server.url,
            model=server.model,
            timeout_s=self._design.timeout_s,
            speculative=not arm.is_baseline,
        )
        self._describe(arm, capabilities, deployment, server.command)
        return self._targets[arm.name]

    def _resolve_draft(self, speculation: Speculation | None) -> Speculation | None:
        if speculation is None or speculation.draft is None:
            return speculation
        return replace(speculation, draft=resolve_model(speculation.draft))

    def _given(self, arm: Arm) -> Target:
        """The user's own server; waits a while for one that is restarting."""
        assert arm.url is not None  # noqa: S101
        headers = api_headers(arm)
        deadline = time.monotonic() + (RETURN_PATIENCE_S if arm.name in self._targets else 0)
        while True:
            try:
                capabilities = probe(arm.url, headers=headers, model=arm.model)
                break
            except ServerError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(1.0)
        if arm.is_baseline and capabilities.speculative:
            raise InputError(
                f"Arm {arm.name!r} is the baseline, but the server at {arm.url} speculates.",
                "Point it at a server started without speculation; a ratio against a speculating "
                "baseline means nothing.",
            )
        if not arm.is_baseline and capabilities.speculative is False:
            raise InputError(
                f"Arm {arm.name!r} should speculate, but the server at {arm.url} does not.",
                "Check its --speculative-config, or correct the url.",
            )
        target = Target(
            url=arm.url,
            model=arm.model or capabilities.models[0],
            headers=headers,
            timeout_s=self._design.timeout_s,
            speculative=not arm.is_baseline,
        )
        self._targets[arm.name] = target
        self._describe(arm, capabilities, None, ())
        return target

    def _describe(
        self,
        arm: Arm,
        capabilities: Capabilities,
        deployment: Deployment | None,
        command: tuple[str, ...],
    ) -> None:
        version = capabilities.version
        known = self._described.get(arm.name)
        if known is not None and known.get("vllm") != version:
            raise InputError(
                f"Arm {arm.name!r} was measured on vLLM {known.get('vllm')} so far and now runs "
                f"{version}.",
                "Start a new study folder: figures of two versions cannot be paired.",
            )
        description: dict[str, Any] = {
            "vllm": version,
            "served_models": list(capabilities.models),
            "max_model_len": capabilities.max_model_len,
        }
        if deployment is None:
            description |= {"url": arm.url, "model": arm.model}
        else:
            description |= {
                "model": deployment.model,
                "command": list(command),
                "checkpoint": describe_model(Path(resolve_model(deployment.model))),
            }
            if arm.speculation is not None and arm.speculation.draft is not None:
                draft = Path(resolve_model(arm.speculation.draft))
                description["draft_checkpoint"] = describe_model(draft)
        if description != known:
            self._described[arm.name] = description
            self._on_described(self._described)


def _goes_on(server: Server) -> bool:
    """Whether a server that was up answers again; False if it died, be it while it was waited for.

    Raises ServerError if it runs and does not answer.
    """
    if not server.alive:
        return False
    try:
        server.resume()
    except ServerError:
        if server.alive:
            raise
        return False
    return True


def resolve_model(reference: str) -> str:
    """What vLLM can load for a model reference: a folder or a hub id, as it is, or a bundled one.

    ``bundled:target`` is the demo target padded to the cost of 100M parameters (written to the
    cache at first use), ``bundled:target-300m`` to that of 300M, beside which the draft is cheaper,
    ``bundled:target-unpadded`` the trained one, ``bundled:draft`` its draft.
    Any of them with ``-int8`` or ``-int4`` at the end is its quantised copy.
    """
    if not reference.startswith("bundled:"):
        return reference
    name = reference.removeprefix("bundled:")
    scheme = next((scheme for scheme in Scheme if name.endswith(f"-{scheme}")), None)
    match name.removesuffix(f"-{scheme}"):
        case "target":
            folder = padded_target(cache_folder() / "models")
        case "target-300m":
            folder = padded_target(cache_folder() / "models", "300m")
        case "target-unpadded":
            folder = bundled_target()
        case "draft":
            folder = bundled_draft()
        case _:
            raise InputError(
                f"There is no bundled model {name!r}.",
                "Use bundled:target, bundled:target-300m, bundled:target-unpadded or "
                "bundled:draft, with -int8 or -int4 at the end for a quantised copy.",
            )
    if scheme is not None:
        folder = quantised_checkpoint(cache_folder() / "models", folder, scheme)
    return str(folder)


def api_headers(arm: Arm) -> Mapping[str, str]:
    """The Authorization header of an arm with an API key; InputError if the variable is empty."""
    if arm.api_key_env is None:
        return {}
    key = os.environ.get(arm.api_key_env, "")
    if not key:
        raise InputError(
            f"Arm {arm.name!r} takes its API key from ${arm.api_key_env}, which is not set.",
            f"export {arm.api_key_env}=... and run again.",
        )
    return {"Authorization": f"Bearer {key}"}
