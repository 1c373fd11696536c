"""The drill: faults planted into a running training, and what it made of each. See docs/drill.md."""
