"""Check that a signal in a training waits for the step, leaves a checkpoint, and changes nothing of what comes out."""

import signal

import pytest
from trainings import documents, fused, read_losses, target, train  # noqa: F401  fixtures, too

from fuselm.system import stopping
from fuselm.training.target_training import find_last_checkpoint
from fuselm.training.trainer import FusionTrainer


@pytest.fixture
def stop_in_step(monkeypatch):
    """Send a signal in the middle of one step."""
    real = FusionTrainer.training_step

    def patch(number: int) -> None:
        def step(trainer, *arguments, **options):
            if trainer.state.global_step + 1 == number:
                stopping.request(signal.SIGINT)
            return real(trainer, *arguments, **options)

        monkeypatch.setattr(FusionTrainer, "training_step", step)

    yield patch
    stopping.release()
    stopping.note_resumption("")


@pytest.mark.parametrize("average", [False, 0.4])
def test_a_training_that_was_asked_to_stop_resumes_after_that_step(
    tmp_path,
    target,
    documents,
    fused,
    stop_in_step,
    monkeypatch,
    capfd,
    average,
):
    """The first step is before any score, the fourth after one."""
    train(tmp_path / "whole", target, documents, fused, average=average)
    out = tmp_path / "cut"
    for number in (1, 4):
        stop_in_step(number)
        with pytest.raises(stopping.Stopped):
            train(out, target, documents, fused, average=average)
        assert stopping.describe_resumption().endswith(f"and training resumes after step {number}")
        assert "stopping; again, and it stops at once" in capfd.readouterr().err
        assert find_last_checkpoint(out / "checkpoints") == out / "checkpoints" / f"checkpoint-{number}"
        assert not (out / "model").exists() and not stopping.is_requested()
        monkeypatch.undo()
    assert train(out, target, documents, fused, average=average)["resumed_at_step"] == 4
    model = "model/model.safetensors"
    assert (out / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    assert read_losses(out) == read_losses(tmp_path / "whole")


def test_a_signal_outside_of_a_step_stops_at_once(capfd):
    with pytest.raises(stopping.Stopped):
        stopping.request(signal.SIGTERM)
    assert not stopping.is_requested() and "stopping" in capfd.readouterr().err
