package dev.lobit.demo

import android.app.Activity
import android.content.ActivityNotFoundException
import android.content.Intent
import android.os.Bundle
import android.view.Menu
import android.view.MenuItem
import android.view.View
import android.view.ViewGroup
import android.widget.BaseAdapter
import android.widget.Button
import android.widget.ListView
import android.widget.TextView

/** The first screen: the bundles on this phone, and ways to bring another. */
class BundlesActivity : Screen() {
    private var entries = emptyList<Entry>()
    private val rows = Rows()

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.bundles)
        title = getString(R.string.bundles)
        findViewById<ListView>(R.id.list).apply {
            adapter = rows
            setOnItemClickListener { _, _, index, _ -> startActivity(BundleActivity.intent(context, entries[index].name)) }
        }
        findViewById<Button>(R.id.open_zip).setOnClickListener {
            val types = arrayOf("application/zip", "application/octet-stream")
            val any = Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*")
            pick(any.putExtra(Intent.EXTRA_MIME_TYPES, types), ZIP)
        }
        findViewById<Button>(R.id.open_folder).setOnClickListener { pick(Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), FOLDER) }
        if (state == null) store.refresh()
    }

    private fun pick(intent: Intent, request: Int) = try {
        startActivityForResult(intent, request)
    } catch (_: ActivityNotFoundException) {
        findViewById<TextView>(R.id.problem).setTextOrHide(getString(R.string.no_bundles))
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        super.onActivityResult(request, result, data)
        val uri = data?.data ?: return
        if (result != Activity.RESULT_OK) return
        store.dismissProblem()
        if (request == ZIP) store.takeZip(contentResolver, uri) else store.takeFolder(contentResolver, uri)
    }

    override fun show(state: State) {
        showWork(state)
        entries = state.entries
        findViewById<View>(R.id.empty).visibility = if (entries.isEmpty() && state.work == null) View.VISIBLE else View.GONE
        rows.notifyDataSetChanged()
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        menu.add(R.string.licences)
        return true
    }

    override fun onOptionsItemSelected(item: MenuItem): Boolean {
        startActivity(Intent(this, LicencesActivity::class.java))
        return true
    }

    private inner class Rows : BaseAdapter() {
        override fun getCount() = entries.size

        override fun getItem(index: Int) = entries[index]

        override fun getItemId(index: Int) = index.toLong()

        override fun getView(index: Int, old: View?, parent: ViewGroup): View {
            val view = old ?: layoutInflater.inflate(R.layout.bundle_row, parent, false)
            val entry = entries[index]
            view.findViewById<TextView>(R.id.name).text = entry.name
            view.findViewById<TextView>(R.id.what).text = entry.bundle?.let { summary(it) } ?: entry.problem
            return view
        }
    }

    private fun summary(bundle: dev.lobit.core.Bundle): String {
        val manifest = bundle.manifest
        return "${manifest.model.family}, ${count(manifest.model.parameters)}, ${manifest.recipeName}, ${size(manifest.programBytes)}"
    }

    companion object {
        const val ZIP = 1
        const val FOLDER = 2
    }
}
