if __name__ != "trtune.datasets":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.datasets")
