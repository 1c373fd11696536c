"""The making of a certificate: the gates of a handoff, replays through engines, reproducers, and the document."""

from crosschip.handoff.certificate.gate import Gate, Measure
from crosschip.handoff.certificate.making import GoldenUsed, Made, certify
from crosschip.handoff.certificate.replays import Replayed, replay_document

__all__ = ["Gate", "GoldenUsed", "Made", "Measure", "Replayed", "certify", "replay_document"]
