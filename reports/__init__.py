if __name__ != "trtune.reports":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.reports")
