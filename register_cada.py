"""
Import this once, and the Auto classes of transformers know CADA without `trust_remote_code`:

    import register_cada
    model = AutoModel.from_pretrained("org/cada-cuhk")

It never travels with a checkpoint: there it would make a second checkpoint run the code of the first.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from configuration_cada import CADAConfig
from modeling_cada import CADAForTextToImageRetrieval
from processing_cada import CADAImageProcessor, CADAProcessor


AutoConfig.register("cada", CADAConfig)
AutoModel.register(CADAConfig, CADAForTextToImageRetrieval)
AutoImageProcessor.register(CADAConfig, image_processor_classes={"pil": CADAImageProcessor})
AutoProcessor.register(CADAConfig, CADAProcessor)
