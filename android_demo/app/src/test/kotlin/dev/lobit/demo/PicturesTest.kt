package dev.lobit.demo

import android.app.Activity
import android.app.ActivityManager
import android.content.Context
import android.graphics.Bitmap
import android.graphics.Canvas
import android.widget.Button
import android.widget.EditText
import java.io.File
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Test
import org.junit.runner.RunWith
import org.robolectric.ParameterizedRobolectricTestRunner
import org.robolectric.Robolectric
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode

/** Draws the screens as a phone and a tablet show them, light and dark, into the folder of the property `lobit.pictures`. */
@RunWith(ParameterizedRobolectricTestRunner::class)
@Config(sdk = [34], application = RealApplication::class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
class PicturesTest(private val name: String, private val qualifiers: String) {
    private val app get() = RuntimeEnvironment.getApplication() as RealApplication
    private val store get() = app.store

    @Before
    fun prepare() {
        RuntimeEnvironment.setQualifiers(qualifiers)
        if ("large" in name) RuntimeEnvironment.setFontScale(LARGE)
        val system = shadowOf(app.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager)
        system.setMemoryInfo(ActivityManager.MemoryInfo().apply { availMem = FREE })
        store.refresh()
        await("the bundle is listed") { store.state.entries.isNotEmpty() }
    }

    private fun draw(activity: Activity, what: String) {
        val view = activity.window.decorView
        val metrics = activity.resources.displayMetrics
        view.measure(exactly(metrics.widthPixels), exactly(metrics.heightPixels))
        view.layout(0, 0, metrics.widthPixels, metrics.heightPixels)
        val picture = Bitmap.createBitmap(metrics.widthPixels, metrics.heightPixels, Bitmap.Config.ARGB_8888)
        view.draw(Canvas(picture))
        val points = (0 until picture.height step 7).flatMap { y -> (0 until picture.width step 7).map { x -> x to y } }
        assertTrue("$what is not one colour", points.map { (x, y) -> picture.getPixel(x, y) }.distinct().size > 10)
        val file = File(System.getProperty("lobit.pictures")!!, "$what-$name.png")
        file.outputStream().use { picture.compress(Bitmap.CompressFormat.PNG, 100, it) }
    }

    private fun exactly(size: Int) = android.view.View.MeasureSpec.makeMeasureSpec(size, android.view.View.MeasureSpec.EXACTLY)

    @Test
    fun screens() {
        draw(Robolectric.buildActivity(BundlesActivity::class.java).setup().visible().get(), "bundles")
        draw(Robolectric.buildActivity(BundleActivity::class.java, BundleActivity.intent(app, "story")).setup().visible().get(), "bundle")
        val chat = Robolectric.buildActivity(ChatActivity::class.java, ChatActivity.intent(app, "story")).setup().visible().get()
        await("the model is loaded") { store.state.open == "story" && store.state.work == null }
        store.change(Settings(0f, SHORT))
        chat.view<EditText>(R.id.prompt).setText("Once there was")
        chat.view<Button>(R.id.send).performClick()
        await("the answer") { !store.state.answering && store.state.counts != null }
        draw(chat, "chat")
        val bench = Robolectric.buildActivity(BenchActivity::class.java, BenchActivity.intent(app, "story")).setup().visible().get()
        bench.view<EditText>(R.id.prompts).setText("64,128")
        bench.view<EditText>(R.id.depths).setText("0,64")
        bench.view<EditText>(R.id.generates).setText("32")
        bench.view<Button>(R.id.start).performClick()
        await("the result") { store.state.bench?.running == false }
        draw(bench, "bench")
    }

    companion object {
        private const val LARGE = 1.8f
        private const val SHORT = 40
        private const val FREE = 3_100_000_000L

        @JvmStatic
        @ParameterizedRobolectricTestRunner.Parameters(name = "{0}")
        fun sizes() = listOf(
            arrayOf("phone-light", "w411dp-h891dp-notnight-xhdpi"),
            arrayOf("phone-dark", "w411dp-h891dp-night-xhdpi"),
            arrayOf("phone-large", "w411dp-h891dp-notnight-xhdpi"),
            arrayOf("tablet-light", "w1280dp-h800dp-land-notnight-mdpi"),
            arrayOf("tablet-dark", "w1280dp-h800dp-land-night-mdpi"),
        )
    }
}
