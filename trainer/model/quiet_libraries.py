"""The model libraries, kept off the display and off the network."""

from __future__ import annotations

from ..quiet import stay_offline


def quieten_libraries() -> None:
    """Keep the model libraries' bars off the display, and the libraries off the network."""
    stay_offline()
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
