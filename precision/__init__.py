if __name__ != "trtune.precision":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.precision")
