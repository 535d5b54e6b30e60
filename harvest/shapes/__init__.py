"""The embedded model `shapes`: a small, true FLUX pipeline trained on drawn pictures with known ground truth."""
