"""Say how each model of a run reads conversations: in its own chat template, or in the one that the run file gives."""

from collections.abc import Iterable

from fuselm.models.chat import dialogue_reading, templates
from fuselm.models.locating import Model
from fuselm.models.vocabulary import Vocabulary
from fuselm.runs import config


class DialogueOptions:
    """Hold the templates and system prompts of a run whose corpus has conversations.

    Raises `ValueError` if the run file gives a template that cannot be found.
    """

    def __init__(self, run: config.RunOptions, target: Model):
        self._systems = {f"source {name}": source.system for name, source in run.sources.items()}
        self._template = templates.read_template(run.chat.template, target)

    def check_use(self, models: Iterable[Model]) -> None:
        """Raise `ValueError` if the run file gives a template and every model has one of its own."""
        if self._template is not None and all(map(templates.has_template, models)):
            raise ValueError("chat.template: does nothing here, because every model has a template of its own; drop it")

    def add_template(self, role: str, model: Model, vocabulary: Vocabulary) -> Vocabulary:
        """Return the vocabulary of a model, which reads conversations. Raises `ValueError` if the model cannot."""
        return dialogue_reading.add_chat_template(
            model, vocabulary, template=self._template, system=self._systems.get(role)
        )


def check_unused(run: config.RunOptions) -> None:
    """Raise `ValueError` if an option is given that only conversations need."""
    given = {
        "chat.template": run.chat.template is not None,
        "corpus.bad_rows": run.corpus.bad_rows == "skip",
        "train.on": run.train.on == "all",
        **{f"sources.{name}.system": source.system is not None for name, source in run.sources.items()},
    }
    for option in (option for option, is_given in given.items() if is_given):
        raise ValueError(f"{option}: does nothing here, because the texts have no conversation; drop it")
