"""ComfyUI's entry to the node pack; anywhere else, importing it does nothing."""

import importlib.util

if __package__ and importlib.util.find_spec("comfy"):
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
