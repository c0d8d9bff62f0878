"""Backbones: the image encoders of other libraries behind one interface."""
