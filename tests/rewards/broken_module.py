raise OSError("no licence file")
