"""The cost model: time, bytes and memory of a step, predicted from one resolved step and the times of the stages."""
