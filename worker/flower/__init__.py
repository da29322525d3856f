"""Jobs as rows in Flower."""
