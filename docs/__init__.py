"""The pages of the site, and the programs that write what they show."""
