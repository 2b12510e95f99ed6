"""Adapters: at which events of a training loop the phases of a session happen, one loop a file."""

# On disk this folder stands beside the package; imported from there it would be a second copy of
# every adapter, with classes and registries of its own.
if __name__ != "deepclean_hooks.integrations":
    raise ImportError(
        f"this package was imported as {__name__!r}; import its names from deepclean_hooks, "
        "or its modules as deepclean_hooks.integrations"
    )
