"""What is measured: bounds and estimates of spectra, of anything given by blocks or products."""
