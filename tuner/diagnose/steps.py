"""All seven steps in order. After a failed step, the later ones report what they still can, or why they cannot."""

from __future__ import annotations

from typing import Literal

from tuner.diagnose.backward import check_backward
from tuner.diagnose.checkpoint import check_checkpoint
from tuner.diagnose.data import check_data
from tuner.diagnose.environment import check_environment
from tuner.diagnose.features import check_features
from tuner.diagnose.findings import Diagnosis, Step
from tuner.diagnose.forward import check_forward
from tuner.diagnose.recordings import Progress
from tuner.diagnose.strategy import check_strategy
from tuner.diagnose.subject import DiagnoseRequest, Subject
from tuner.encoders.registry import inspect_encoder
from tuner.errors import DataError, EncoderError


def diagnose(
    request: DiagnoseRequest,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Diagnosis:
    """Run the seven steps.

    Args:
        precision: of the frozen encoder; `auto` is fp32 where memory allows.
        progress: called with the number of a manifest's recordings that were read, and of all.
    """
    subject = Subject(request)
    try:
        subject.spec = inspect_encoder(request.encoder)
    except EncoderError as error:
        subject.spec_error = str(error)
    return Diagnosis(
        (
            check_environment(),
            _data(subject, progress),
            check_checkpoint(subject, precision, device),
            check_features(subject),
            check_forward(subject),
            check_backward(subject),
            check_strategy(subject),
        )
    )


def _data(subject: Subject, progress: Progress) -> Step:
    try:
        return check_data(subject, progress)
    except DataError as error:
        step = Step("data")
        step.error(str(error))
        return step
