"""Spikes and divergences, real ones and others, as several rules see them."""
