"""What lmms-eval finds by the entry point ``lmms_eval.models``: that there is a model ``deepstack_pl``, and where."""

from lmms_eval.models.registry_v2 import ModelManifest

_ROOM = "deepstack_pl.evaluation.lmms"
MANIFEST = ModelManifest(
    model_id="deepstack_pl",
    chat_class_path=f"{_ROOM}.DeepStackChat",
    simple_class_path=f"{_ROOM}.DeepStackSimple",  # --force_simple: tasks of likelihoods
)
