"""Programs that write the measured pages of the site, each named like its page."""
