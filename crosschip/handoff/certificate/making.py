"""certificate.json: gates, replays, hashes and fingerprints put together, sealed, signed, and laid beside the files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import crosschip
from crosschip.certificate import Certificate, read_certificate
from crosschip.certificate.document import CERTIFICATE_FILE, SCHEMA_VERSION, seal_of, worst_verdict, write_certificate
from crosschip.certificate.files import files_of, hash_files
from crosschip.certificate.signing import sign
from crosschip.certificate.verifying import verify
from crosschip.chips import Chip, fingerprint
from crosschip.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_OK
from crosschip.golden.bundle import Bundle
from crosschip.handoff.certificate.gate import GATES, NOT_COVERED, Gate, gate_of, not_covered, plain
from crosschip.handoff.certificate.replays import Replayed, replay_document, replay_gate

__all__ = ["GoldenUsed", "Made", "certify", "earlier_certificate", "gates_before"]

Tell = Callable[[str], None]

_EXIT_CODES = {"FAIL": EXIT_FAIL, "INCONCLUSIVE": EXIT_INCONCLUSIVE}
_WHY_NOT = {
    "answer-level scores": "no comparison of answers was given (`crosschip handoff compare A B`)",
    "generation health": "no answers were generated and examined",
    "overwrite": "loading another checkpoint into a running engine is tried with our own, where its replay passes",
    "write-read": "that the saving chip reads its checkpoint back to the same loss was not given",
    "tokenizer and chat template": "not compared",
}


@dataclass(frozen=True)
class GoldenUsed:
    """The bundle that was replayed. `is_new`: this very handoff recorded it."""

    bundle: Bundle
    is_new: bool = False

    @property
    def recorded_now(self) -> bool:
        """Whether a handoff recorded it, this one or an earlier one, instead of somebody on the training chip."""
        return bool(self.bundle.manifest.get("for_handoff"))

    def document(self) -> dict[str, Any]:
        """What the certificate says about it."""
        manifest = self.bundle.manifest
        noise = {key: manifest["noise_floor"][key] for key in ("mean_kl", "logprob")}
        where = manifest["recorded_on"]
        words = (
            f"recorded by the handoff, on {where}: it proves the conversion and the engine, not the chip that trained"
        )
        return {
            "seal": manifest["seal"],
            "sha256": manifest["sha256"],
            "recorded_on": where,
            "recorded_at": manifest["recorded_at"],
            "recorded_now": self.recorded_now,
            "remark": words if self.recorded_now else None,
            "route": self.bundle.route,
            "compute_dtype": self.bundle.dtype,
            "rows": len(self.bundle.lengths),
            "tokens": sum(self.bundle.lengths),
            "noise_floor": noise,
            "fingerprint": manifest["fingerprint"],
        }


@dataclass(frozen=True)
class Made:
    """A certificate that was made."""

    certificate: Certificate
    verdict: str

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return _EXIT_CODES.get(self.verdict, EXIT_OK)


def certify(
    directory: Path,
    *,
    target: dict[str, Any],
    source: dict[str, Any],
    golden: GoldenUsed,
    gates: Sequence[Gate],
    replays: Sequence[Replayed],
    chip: Chip,
    earlier: Certificate | None = None,
    answers: dict[str, Any] | None = None,
    not_covered_too: Sequence[str] = (),
    key: Path | None = None,
    tell: Tell = lambda line: None,
) -> Made:
    """Write `directory`/certificate.json; an earlier one is replaced whole.

    Args:
        directory: the files that were handed off; all of them are hashed.
        target: name, dtype and kind of quantisation of the form.
        source: where the model came from, in words and numbers.
        golden: the bundle.
        gates: the gates that were gone through, but the golden replay's own, which is made of `replays`.
        replays: the replays made now.
        chip: of the machine that makes the certificate.
        earlier: a certificate of the same files: its replays of the same bundle are kept beside the new ones, and gates
            that nobody went through now are taken over.
        answers: the document of `crosschip handoff compare`.
        not_covered_too: what else was left out, in words.
        key: a PEM file with an ed25519 private key to sign with.
        tell: hears how far the hashing is.

    Raises:
        HandoffError: the key cannot be read, or a file cannot be hashed.
    """
    anew = [replay_document(each, replays) for each in replays]
    documents = [*_kept(earlier, golden, anew), *anew]
    ordered = _ordered([*gates, replay_gate(documents)], earlier)
    verdict = worst_verdict([gate.verdict for gate in ordered if gate.verdict != NOT_COVERED])
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "crosschip": crosschip.__version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "verdict": verdict,
        "target": target,
        "source": {**source, "weights": _weights(golden.bundle)},
        "files": [asdict(each) for each in hash_files(directory, files_of(directory), tell)],
        "golden": golden.document(),
        "gates": [gate.document() for gate in ordered],
        "replays": documents,
        "answers": answers if answers is not None or earlier is None else earlier.document.get("answers"),
        "not_covered": _all_not_covered(ordered, documents, not_covered_too),
        "machine": fingerprint(chip),
        "taken_over": None if earlier is None else _taken_over(earlier, ordered, gates, documents),
    }
    document = plain(document)
    if key is not None:
        document["signature"] = sign(document, key)
    document["seal"] = seal_of(document)
    write_certificate(directory, document)
    return Made(Certificate(directory / CERTIFICATE_FILE, document), verdict)


def earlier_certificate(directory: Path, tell: Tell = lambda line: None) -> Certificate | None:
    """The certificate that lies there already, if it is whole and of the files as they are now."""
    if not (directory / CERTIFICATE_FILE).is_file():
        return None
    found = verify(directory, tell=tell)
    return read_certificate(directory) if found.is_intact else None


def gates_before(earlier: Certificate) -> dict[str, Gate]:
    """The gates of an earlier certificate by name; none where they have another form than ours."""
    try:
        found = [gate_of(each) for each in earlier.document["gates"]]
    except (KeyError, TypeError):
        return {}
    return {gate.name: gate for gate in found if gate.name in GATES}


def _taken_over(
    earlier: Certificate, ordered: Sequence[Gate], anew: Sequence[Gate], replays: list[dict[str, Any]]
) -> dict[str, Any]:
    """What this certificate says on the word of an earlier one, and whose word that is."""
    made = {gate.name for gate in anew if gate.verdict != NOT_COVERED} | {"golden replay"}
    return {
        "made_at": earlier.document["made_at"],
        "seal": earlier.document["seal"],
        "signed_with": None if earlier.signature is None else earlier.signature.get("public_key"),
        "gates": [gate.name for gate in ordered if gate.verdict != NOT_COVERED and gate.name not in made],
        "replays": [f"{each['engine']['name']}, {each['dtype']}" for each in replays if each in earlier.replays],
    }


def _kept(earlier: Certificate | None, golden: GoldenUsed, anew: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier replays of the same bundle by another engine, on another kind of chip or in another dtype."""
    if earlier is None or earlier.document["golden"].get("seal") != golden.bundle.manifest["seal"]:
        return []
    made = [_identity(each) for each in anew]
    return [each for each in earlier.replays if _identity(each) not in made]


def _identity(replay: dict[str, Any]) -> tuple[Any, ...]:
    return replay["engine"]["name"], replay["chip_kind"], replay["dtype"]


def _ordered(gates: Sequence[Gate], earlier: Certificate | None) -> list[Gate]:
    """All gates in their order; what nobody went through now is taken over, since the files are unchanged."""
    given = {gate.name: gate for gate in gates if gate.verdict != NOT_COVERED}
    before = {} if earlier is None else gates_before(earlier)
    silent = {gate.name: gate for gate in gates if gate.verdict == NOT_COVERED}
    found = []
    for name in GATES:
        known = [group[name] for group in (given, before, silent) if name in group]
        found.append(known[0] if known else not_covered(name, _WHY_NOT.get(name, "not gone through")))
    return found


def _weights(bundle: Bundle) -> dict[str, Any]:
    """All recorded tensors as one hash: SHA-256 over `name sha256` of each, a line each, in the order of names."""
    lines = "".join(f"{name} {record.sha256}\n" for name, record in sorted(bundle.weights.items()))
    return {
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "num_tensors": len(bundle.weights),
        "dtype": bundle.manifest["weights_dtype"],
    }


def _all_not_covered(gates: Sequence[Gate], replays: list[dict[str, Any]], more: Sequence[str]) -> list[str]:
    found = [f"{gate.name}: {gate.message}" for gate in gates if gate.verdict == NOT_COVERED]
    found += [f"{gate.name}: {words}" for gate in gates for words in gate.not_covered]
    found += [
        f"{each['engine']['name']}, {each['dtype']}: {words}" for each in replays for words in each["not_covered"]
    ]
    return list(dict.fromkeys([*found, *more]))
