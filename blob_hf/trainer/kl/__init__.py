"""The KL in a training: its schedule, its own step, what it will do and what it did."""

from blob_hf.trainer.kl.adaptive import AdaptiveSchedule
from blob_hf.trainer.kl.diagnosis import KLDiagnosis, diagnose
from blob_hf.trainer.kl.history import KLHistory
from blob_hf.trainer.kl.schedule import KLSchedule, kl_cycle_length
from blob_hf.trainer.kl.state import KLState
from blob_hf.trainer.kl.step import DecoupledKLStep
from blob_hf.trainer.kl.target import TargetSchedule
from blob_hf.trainer.kl.verdict import KLFigures, Verdict, judge

__all__ = [
    "AdaptiveSchedule",
    "DecoupledKLStep",
    "KLDiagnosis",
    "KLFigures",
    "KLHistory",
    "KLSchedule",
    "KLState",
    "TargetSchedule",
    "Verdict",
    "diagnose",
    "judge",
    "kl_cycle_length",
]
