"""Federated fine-tuning of large language models on HPC clusters.

hpcfed.run(source, overrides, ranks=...)    a run from Python; hpcfed.Result reads one
hpcfed.register                             parts of a method of your own, see hpcfed.registry
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcfed.api import Result, run
    from hpcfed.errors import UserError
    from hpcfed.policies.sharing import Split
    from hpcfed.policies.updates import Transform, Update
    from hpcfed.registry import register

__all__ = ["Result", "Split", "Transform", "Update", "UserError", "register", "run"]

# Imported when they are used: `import hpcfed` takes no time.
_PLACES = {
    "Result": "hpcfed.api",
    "run": "hpcfed.api",
    "UserError": "hpcfed.errors",
    "Split": "hpcfed.policies.sharing",
    "Transform": "hpcfed.policies.updates",
    "Update": "hpcfed.policies.updates",
    "register": "hpcfed.registry",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hpcfed")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'hpcfed' has no attribute {name!r}")
