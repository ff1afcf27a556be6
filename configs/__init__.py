if __name__ != "trtune.configs":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.configs")
