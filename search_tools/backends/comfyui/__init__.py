"""The run of a workflow, sampled by ComfyUI itself."""
