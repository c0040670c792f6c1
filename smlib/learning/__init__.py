"""From rationales to models: ranking, SFT, the reward model, DPO, and Self-Explore's search for first pits."""
