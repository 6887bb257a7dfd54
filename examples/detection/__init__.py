"""The parts of detect.py: data, the detector, how it is measured and drawn."""
