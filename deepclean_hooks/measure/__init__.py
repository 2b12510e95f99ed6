"""What a method measures of a data set, as sums over its samples."""
