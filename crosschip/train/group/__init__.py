"""Inside a replica group: the processes (ranks) that train one model together, and how the model lies on them."""
