"""The golden bundle: what a model answered on the chip that trained it, recorded once and replayed anywhere.

Nothing is imported here: parts of this room need torch, and parts do not.
"""
