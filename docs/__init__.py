"""The pages of the site, and the programs that write the measured ones."""
