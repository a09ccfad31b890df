"""ComfyUI's entry to the node pack; anywhere else, importing it does nothing."""

import importlib.util

if __package__ and importlib.util.find_spec("comfy"):
    if not (importlib.util.find_spec("comfy_api") and importlib.util.find_spec("comfy_api.latest")):
        raise ImportError("Flexiffusion needs ComfyUI 0.3.48 or newer (comfy_api.latest); update ComfyUI")

    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
