"""Knowledge distillation: losses, and which layer of the student learns from which of the teacher."""
