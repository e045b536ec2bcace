"""What the scripts share: arguments, output folders, one-line errors, the choice of a method."""
