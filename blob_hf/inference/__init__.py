"""What one does with a posterior: predict, generate, measure uncertainty, export samples."""
