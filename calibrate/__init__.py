if __name__ != "trtune.calibrate":
    raise ImportError(f"{__name__!r} was found through the repository root: use trtune.calibrate")
